"""Activations × int8 weights with a scale for each row: the head of a packed model.

Sums of two products of int8 need 17 bits, and PyTorch's int8 product on x86 without VNNI saturates
them at 16. What serves, all of it exact:

    CUDA                      Triton's dense kernel, or PyTorch's product where Triton does not run
    CPU, few tokens           the compiled kernel, which sums in 32 bits on every path
    CPU with AVX512-VNNI      PyTorch's product
    CPU, up to 128 rows       the compiled kernel, unless it is plain C++
    elsewhere                 the reference: float32, in pieces that are exact
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from sparse_bitnet.core.activation import quantize_int8
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.int8_linear import reference
from sparse_bitnet.kernels.int8_linear.reference import two_terms
from sparse_bitnet.kernels.matmul import byte_matmul, cpu, integer_matmul
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.quantize_activations import quantize_activations

__all__ = ["int8_linear", "two_terms"]

LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that keep PyTorch's products from instructions which the processor has."""


def int8_linear(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Y = X @ (scale · W)ᵀ + bias; arguments and results of the reference.

    All that serve give the same values, to the last bit, except inside ``torch.compile`` on CUDA,
    where a step of the quantization may differ in its last bit.
    """
    # The kernel is one launch, and divides by 127 as a CPU does where PyTorch on CUDA multiplies by
    # 1/127. A compiler does that too, but fuses the formula with what comes before.
    quantize = quantize_int8 if torch.compiler.is_compiling() else quantize_activations
    return reference.int8_linear(x, weight, w_scale, bias, out_dtype, quantize, _product)


def _product(x_q: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor) -> Tensor:
    exact = x_q.is_cuda or (x_q.device.type == "cpu" and _sums_in_32_bits())
    if runs_triton(x_q):
        return byte_matmul(x_q, x_scale, weight, w_scale)
    if cpu.serves_bytes(x_q, weight, cpu.MOST_BYTE_TOKENS if exact else _most_tokens()):
        return cpu.linear(x_q, weight, "bytes", w_scale, None, torch.float32, x_scale)
    if exact:
        return integer_matmul(x_q, weight).float().mul_(x_scale).mul_(w_scale)
    return reference.scaled_matmul(x_q, x_scale, weight, w_scale)


@torch.compiler.assume_constant_result
def _sums_in_32_bits() -> bool:
    """Whether PyTorch's int8 product on this CPU is exact for any int8."""
    vnni = torch.cpu.get_capabilities().get("avx512_vnni", False)
    return bool(vnni) and not any(os.environ.get(name) for name in LIMITS)


@torch.compiler.assume_constant_result
def _most_tokens() -> int:
    """Rows for which the compiled kernel beats float32: at 64 by two, at 512 no more."""
    return cpu.MOST_BYTE_TOKENS if native.path() == "portable" else 128
