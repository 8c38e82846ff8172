"""What this machine offers to kernels."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)
"""Triton's int8 products and cuSPARSELt begin here."""


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
    return tensor.is_cuda and _serves(tensor.device.index)


@torch.compiler.assume_constant_result
def _serves(device_index: int | None) -> bool:
    return has_triton() and capability(device_index) >= OLDEST_CAPABILITY
