"""Activations × int8 weights with a scale for each row: the head of a packed model."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.activation import quantize_int8
from sparse_bitnet.kernels.int8_linear import reference
from sparse_bitnet.kernels.int8_linear.reference import two_terms
from sparse_bitnet.kernels.matmul import cpu, ternary_matmul
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.quantize_activations import quantize_activations

__all__ = ["int8_linear", "two_terms"]


def int8_linear(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Y = X @ (scale · W)ᵀ + bias; arguments and results of the reference.

    On CUDA, and for few tokens on a CPU, the int8 product of :func:`ternary_matmul`, whose kernels
    take any int8 weight; the reference elsewhere. All give the same values, to the last bit, except
    inside ``torch.compile`` on CUDA, where a step of the quantization may differ in its last bit.
    """
    rows = x.reshape(-1, x.shape[-1])
    # The kernel is one launch, and divides by 127 as a CPU does where PyTorch on CUDA multiplies by
    # 1/127. A compiler does that too, but fuses the formula with what comes before.
    quantize = quantize_int8 if torch.compiler.is_compiling() else quantize_activations
    x_q, x_scale = two_terms(rows, quantize)
    if runs_triton(x_q) or cpu.serves_bytes(x_q, weight):
        y = ternary_matmul(x_q, x_scale, weight, w_scale, None, torch.float32)
    else:
        y = reference.scaled_matmul(x_q, x_scale, weight, w_scale)
    y = reference.add_terms(y, bias, out_dtype or x.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])
