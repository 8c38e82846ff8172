"""What this machine offers to kernels."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sparse_bitnet.core.errors import ConfigError

OLDEST_CAPABILITY = (8, 0)
"""Triton's int8 products begin here."""


@cache
def has_triton() -> bool:
    """True where Triton can be imported; CUDA builds of PyTorch bring it."""
    return find_spec("triton") is not None


@cache
def capability(device_index: int | None) -> tuple[int, int]:
    """CUDA compute capability, (9, 0) for Hopper."""
    return torch.cuda.get_device_capability(device_index)


def runs_triton(tensor: Tensor) -> bool:
    """True if this package's Triton kernels serve the tensor's device."""
    return tensor.is_cuda and serves_triton(tensor.device.index)


@torch.compiler.assume_constant_result
def serves_triton(device_index: int | None) -> bool:
    """True if this package's Triton kernels serve that CUDA device."""
    return has_triton() and capability(device_index) >= OLDEST_CAPABILITY


def compile_options() -> dict[str, Any]:
    """``options`` of ``torch.compile`` for chains of short kernels, as far as it has them.

    The compiler's own kernels use PDL too (:mod:`sparse_bitnet.kernels.pdl`), and
    those that do not need each other, such as rotations of queries and keys, become one.
    """
    import torch._inductor.config as inductor

    if not torch.cuda.is_available():
        return {}
    options = {"combo_kernels": True}
    if hasattr(inductor.triton, "enable_pdl"):
        options["triton.enable_pdl"] = True
    return options


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; if none was, the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: if PyTorch cannot compute on it here.
    """
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(1, device=device).is_meta:
            raise RuntimeError("it holds shapes and no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            f"device {str(device)!r} cannot be used here ({reason}); choose cpu, or an NVIDIA GPU "
            f"as cuda or cuda:N, of which PyTorch finds {torch.cuda.device_count()}"
        ) from None
    return torch.device(device)
