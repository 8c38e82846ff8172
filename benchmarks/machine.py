"""What a measurement depends on besides the code: versions, commit, device, clocks, power."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from sparse_bitnet.kernels.environment import environment

SMI_FIELDS = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "most_sm_mhz": "clocks.max.sm",
    "watts": "power.draw.instant",
    "most_watts": "power.limit",
    "celsius": "temperature.gpu",
}
CPUINFO = Path("/proc/cpuinfo")


def measured_on() -> dict[str, Any]:
    """:func:`environment` and, as they are now, what changes the speed of the device.

    ``load_average`` is the system's, over a minute; ``gpu`` holds the fields of :func:`gpu_state`
    and is empty without a GPU.
    """
    return {
        **environment(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "gpu": gpu_state(),
    }


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def gpu_state() -> dict[str, Any]:
    """Driver, clocks, power and temperature of PyTorch's current GPU, by ``nvidia-smi``.

    Keys are those of :data:`SMI_FIELDS`; what is not told is left out.
    """
    if not torch.cuda.is_available():
        return {}
    # By its name: nvidia-smi counts the GPUs that CUDA_VISIBLE_DEVICES hides too.
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={','.join(SMI_FIELDS.values())}"]
    command.append("--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return {k: _number(v) for k, v in zip(SMI_FIELDS, values, strict=False) if v[:1] != "["}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
