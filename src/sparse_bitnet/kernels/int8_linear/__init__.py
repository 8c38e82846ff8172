"""Activations × int8 weights with a scale for each row: the head of a packed model."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels.int8_linear import reference
from sparse_bitnet.kernels.int8_linear.reference import two_terms
from sparse_bitnet.kernels.matmul import cpu, ternary_matmul
from sparse_bitnet.kernels.platform import runs_triton

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
    take any int8 weight; the reference elsewhere. All give the same values.
    """
    rows = x.reshape(-1, x.shape[-1])
    x_q, x_scale = two_terms(rows)
    if runs_triton(x_q) or cpu.serves_bytes(x_q, weight):
        y = ternary_matmul(x_q, x_scale, weight, w_scale, None, torch.float32)
    else:
        y = reference.scaled_matmul(x_q, x_scale, weight, w_scale)
    y = reference.add_terms(y, bias, out_dtype or x.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])
