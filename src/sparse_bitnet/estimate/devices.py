"""Peak rates and bandwidths of processors, from datasheets or measured here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from sparse_bitnet.core import ConfigError
from sparse_bitnet.kernels.registry import prepare, ternary_linear

SECONDS = 0.3  # of measuring each figure of this CPU


@dataclass(frozen=True)
class Device:
    """A processor's peak rates: ``bf16`` TFLOPS and ``int8`` TOPS of dense products, memory
    ``bandwidth`` in GB/s, ``memory`` in GB (0 where unknown), ``link`` to each other in GB/s."""

    name: str
    bf16: float
    int8: float
    bandwidth: float
    memory: float
    source: str
    link: float = 32.0  # PCIe 4.0, 16 lanes, one direction

    @property
    def is_gpu(self) -> bool:
        return self in GPUS.values()


# Dense figures; the datasheets' headline figures are with sparsity, twice these. Link: NVLink, one
# direction.
GPUS = {
    "a100": Device("A100 SXM 80 GB", 312, 624, 2039, 80, "NVIDIA A100 datasheet, June 2021", 300),
    "h100": Device("H100 SXM", 989.4, 1978.9, 3350, 80, "NVIDIA H100 datasheet", 450),
    "h200": Device("H200 SXM", 989.4, 1978.9, 4800, 141, "NVIDIA H200 datasheet", 450),
    "b200": Device("B200 (HGX)", 2250, 4500, 8000, 180, "NVIDIA Blackwell architecture brief", 900),
    "l4": Device("L4", 121, 242.5, 300, 24, "NVIDIA L4 datasheet"),
    "l40s": Device("L40S", 362.05, 733, 864, 48, "NVIDIA L40S datasheet"),
    "rtx4090": Device("RTX 4090", 165.2, 660.6, 1008, 24, "NVIDIA Ada architecture paper, table 2"),
}


def device_named(name: str) -> Device:
    """A GPU by its short name, or ``"cpu"``: this one, measured in about a second: PyTorch's bf16
    products, this package's int8 ones, and a sum over memory.

    Raises:
        ConfigError: for another name.
    """
    if name in GPUS:
        return GPUS[name]
    if name != "cpu":
        raise ConfigError(f"--gpu {name!r} is unknown; choose among {', '.join(GPUS)}, cpu")
    a, b = (torch.ones(rows, 2048, dtype=torch.bfloat16) for rows in (512, 2048))
    ternary, large = prepare(b.to(torch.int8), torch.ones(2048)), torch.ones(2**26)
    tera, threads = 2 * 512 * 2048 * 2048 / 1e12, torch.get_num_threads()
    return Device(
        name=f"this CPU, {threads} thread{'s' if threads > 1 else ''}",
        bf16=tera / _seconds(lambda: a @ b),
        int8=tera / _seconds(lambda: ternary_linear(a, ternary)),
        bandwidth=large.nbytes / _seconds(large.sum) / 1e9,  # 256 MB, beyond the caches
        memory=0.0,
        source="measured now: torch's bf16 and this package's int8 products",
    )


def _seconds(call: Callable[[], object]) -> float:
    """The shortest of the calls that fit the time."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=SECONDS).times)
