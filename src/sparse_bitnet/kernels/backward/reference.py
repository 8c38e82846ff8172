"""The dual straight-through estimator's two products, step by step.

    dX = dY @ (γT)          dW = dYᵀ @ (x_scale·Xq)

:func:`input_gradient` and :func:`weight_gradient` compute in dY's dtype. The ``fp8`` functions are
the steps of the other precision, in float32 of values that went through e4m3; their place in the
whole is told in ``fp8.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
SMALLEST_POWER = 2.0**-100
"""Rows of smaller magnitude share this scale: zeros have one too, and its inverse is finite."""
ONE_BITS = 127 << 23
"""Of 1.0 as float32."""
HEADROOM = 2.0**7
"""A row's largest magnitude lands in [2⁷, 2⁸); e4m3 ends at 448."""


def input_gradient(dy: Tensor, ternary: Tensor, w_scale: Tensor, one_scale: bool) -> Tensor:
    """dX = dY @ (γT), in dY's dtype.

    Args:
        dy: ``[tokens, out]``.
        ternary: int8 ``[out, in]``.
        w_scale: float32 ``[out]``, γ of every row.
        one_scale: all rows have the same γ. In bf16 it is then applied to the result, so that the
            weight operand is exact and the multiplication joins whatever reads dX. (float16 could
            not hold the unscaled sums.)
    """
    weight = ternary.to(dy.dtype)
    if one_scale and dy.dtype == torch.bfloat16:
        return (dy @ weight).mul_(w_scale.select(0, 0))
    return dy @ weight.mul_(w_scale.unsqueeze(-1))


def dequantized(x_q: Tensor, x_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x_scale·Xq, rounded once to ``dtype``."""
    return x_q.to(dtype).mul_(x_scale)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dYᵀ @ X in dY's dtype, then ``dtype``.

    Args:
        dy: ``[tokens, out]``.
        x: ``[tokens, in]``, as :func:`dequantized` gives it.
    """
    return (dy.t() @ x).to(dtype)


def power_of_two(values: Tensor) -> Tensor:
    """The largest power of two not above each positive float32."""
    bits = values.float().view(torch.int32) & 0x7F800000
    return bits.view(torch.float32)


def fp8_rows(dy: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor]:
    """dY ≈ scale·values, the scale a power of two for each token.

    Args:
        dy: ``[tokens, out]``.
        fold: float32 ``[out]``, multiplied in first, or None.

    Returns:
        e4m3 ``[tokens, out]`` and float32 ``[tokens]``; the scale of a token that is not finite is
        NaN, since e4m3 has no infinity to show it.
    """
    values = dy.float() if fold is None else dy.float() * fold
    if dy.shape[-1] == 0:
        return values.to(FP8), dy.new_full(dy.shape[:1], SMALLEST_POWER, dtype=torch.float32)
    largest = values.abs().amax(-1)
    power = power_of_two(largest.clamp(min=SMALLEST_POWER * HEADROOM)) * (1.0 / HEADROOM)
    finite = torch.isfinite(largest)
    # 1/2ᵏ by its exponent: exact even where a compiler's division is not.
    inverse = (ONE_BITS * 2 - power.view(torch.int32)).view(torch.float32)
    scaled = values * torch.where(finite, inverse, 1.0).unsqueeze(-1)
    return scaled.to(FP8), torch.where(finite, power, torch.nan)


def fp8_transposed(values: Tensor, factor: Tensor | None) -> Tensor:
    """``[rows, columns]`` → e4m3 ``[columns, rows]``, each row multiplied by its factor first.

    Args:
        values: int8 or e4m3.
        factor: float32 ``[rows]`` or None.
    """
    full = values.float()
    if factor is not None:
        full = full * factor.unsqueeze(-1)
    return full.to(FP8).t().contiguous()


def fp8_matmul(a: Tensor, b: Tensor, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """scale·(A @ Bᵀ) of e4m3 ``[m, k]`` and ``[n, k]``; ``scale`` is one float32, None is 1."""
    product = a.float() @ b.float().t()
    return (product if scale is None else product * scale).to(out_dtype)
