"""Float activations × int8 weights, in exact integer arithmetic.

Few tokens need logits, so this product is bound by reading the weight once, and a second row of
activations costs nothing. Each token therefore goes in as two int8 rows, its absmax quantization
and that of what it left over: about 15 bits together. So the weight's rounding is all that an int8
head loses, also where a few large lanes would leave the others of a single int8 row with nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_bitnet.core.activation import quantize_int8
from sparse_bitnet.core.errors import WeightError

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]

EXACT_LANES = 1023
"""Products of two int8 values, at most 2¹⁴ each, that float32 sums exactly: below 2²⁴ / 2¹⁴."""
LONGEST_ROW = 2**17
"""Products of two int8 values that int32 sums: fewer than 2³¹ / 2¹⁴."""


def two_terms(x: Tensor, quantize: Quantizer = quantize_int8) -> tuple[Tensor, Tensor]:
    """int8 ``[2·tokens, in]`` and float32 ``[2·tokens, 1]``: all tokens, then all remainders.

    Args:
        x: ``[tokens, in]``, float.
        quantize: a backend of ``quantize_int8``.
    """
    x = x.detach().float()
    first, first_scale = quantize(x)
    rest, rest_scale = quantize(x - first * first_scale)
    return torch.cat([first, rest]), torch.cat([first_scale, rest_scale])


def scaled_matmul(x_q: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor) -> Tensor:
    """(Xq @ Wᵀ) · x_scale · w_scale: float32 ``[tokens, out]``."""
    return int8_matmul(x_q, weight).float().mul_(x_scale).mul_(w_scale)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    quantize: Quantizer = quantize_int8,
    product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = scaled_matmul,
) -> Tensor:
    """Y = X @ (scale · W)ᵀ + bias.

    Args:
        x: ``[..., in]``, float.
        weight: int8 ``[out, in]``.
        w_scale: float32 ``[out]``, one a row.
        bias: ``[out]`` or None.
        out_dtype: of the result; ``x.dtype`` if left out.
        quantize, product: backends of ``quantize_int8`` and of :func:`scaled_matmul`.

    Returns:
        ``[..., out]``.

    Raises:
        WeightError: if ``in`` is too long for int32.
    """
    check_row(weight.shape[1])
    x_q, x_scale = two_terms(x.reshape(-1, x.shape[-1]), quantize)
    first, rest = product(x_q, x_scale, weight, w_scale).chunk(2)
    y = first + rest
    y = (y if bias is None else y + bias).to(out_dtype or x.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def int8_matmul(x_q: Tensor, weight: Tensor) -> Tensor:
    """Xq @ Wᵀ, exact: int8 ``[tokens, in]`` and int8 ``[out, in]`` → int32 ``[tokens, out]``.

    In float32, in pieces whose sums are exact in any order, and in bf16 or TF32 too if PyTorch is
    allowed those for float32 products: eight significant bits hold every int8.
    """
    total = torch.zeros(x_q.shape[0], weight.shape[0], dtype=torch.int32, device=x_q.device)
    for first in range(0, x_q.shape[1], EXACT_LANES):
        lanes = slice(first, first + EXACT_LANES)
        total += (x_q[:, lanes].float() @ weight[:, lanes].float().t()).to(torch.int32)
    return total


def check_row(columns: int) -> None:
    """Refuse rows whose sums could wrap.

    Raises:
        WeightError: if int32 may not hold the sum of so many products.
    """
    if columns >= LONGEST_ROW:
        raise WeightError(
            f"int8 weight: {columns} input features cannot be summed in 32 bits (the limit is "
            f"{LONGEST_ROW - 1}); keep this layer in floating point"
        )
