"""Both products of the backward pass in e4m3, at twice the rate of bf16.

Rounding an operand to e4m3 changes each value by up to 1/16, without bias. What is exact and what
rounds:

- T is exact: {−1, 0, 1}.
- dY rounds once. A token's scale is a power of two, so that the same e4m3 numbers serve both
  products: for dW a token's scale lies along the contracted dimension, where no product can apply
  it afterwards, and is moved into the numbers, which for powers of two only shifts exponents.
- Xq rounds once, with what is left of the two token scales, a factor in [1, 2).

    dX = [(dY/s) @ T] · s · γ                               s, per token, is dX's row scale
    dW = c · [(dY/s) · f]ᵀ @ [Xq · m]        s·x_scale = c·f·m, f a power of two ≤ 1, m in [1, 2)

c is the largest of those powers over all tokens. A token more than 2¹⁷ times quieter than the
loudest adds nothing to dW: its numbers fall below e4m3's smallest.

Sums run in float32; dX's in Hopper's fast mode, which keeps fewer bits between steps. dW's are as
long as a micro-batch and kept for the optimizer: the fast mode would spare 5 % of that product, but
truncates, an error of one sign that grows with the length and that no later step averages out (3e-3
of dW at 16384 tokens, beside 4e-2 of e4m3's unbiased rounding), so they run in the exact mode.
Sizes that 16 does not divide take the plain products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_bitnet.kernels import compiled
from sparse_bitnet.kernels.backward import reference
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.platform import capability, runs_triton

MULTIPLE = 16
OLDEST_CAPABILITY = (8, 9)


def serves(tokens: int, out_features: int, in_features: int) -> bool:
    """Whether fp8 tensor cores take these sizes."""
    return tokens > 0 and not (
        tokens % MULTIPLE or out_features % MULTIPLE or in_features % MULTIPLE
    )


def gradients(
    dy: Tensor,
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    one_scale: bool,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """(dX, dW) of ``[tokens, …]`` operands; arguments as those of the plain products.

    Returns:
        dX float32 or dY's dtype, its last scaling left to fusion; dW float32.
    """
    dx = dw = None
    if needs[0]:
        # Different γ lie along the contracted dimension, and dW must not see them.
        values, scale = rows(dy, None if one_scale else w_scale)
        factor = scale * w_scale.select(0, 0) if one_scale else scale
        dx = unscaled_input_gradient(values, ternary, dy.dtype) * factor.unsqueeze(-1)
    if needs[1]:
        if not (needs[0] and one_scale):
            values, scale = rows(dy, None)
        dw = weight_gradient(values, scale, x_q, x_scale)
    return dx, dw


def unscaled_input_gradient(values: Tensor, ternary: Tensor, dtype: torch.dtype) -> Tensor:
    """values @ T of e4m3 rows, dX but for the token scales (and γ, if it was not folded in).

    Args:
        dtype: of dY. Unscaled sums reach 2⁸·out, too much for float16, which gives float32.
    """
    out_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return _matmul(values, _transposed(ternary, None), None, out_dtype)


def weight_gradient(values: Tensor, scale: Tensor, x_q: Tensor, x_scale: Tensor) -> Tensor:
    """dW in float32 from dY's e4m3 rows and their scales, without γ."""
    token_scale = x_scale.reshape(-1)
    power = reference.power_of_two(token_scale)
    both = scale * power
    largest = both.max()
    dy_t = _transposed(values, both / largest)
    x_t = _transposed(x_q, token_scale / power)
    return _matmul(dy_t, x_t, largest, torch.float32)


def has_kernels(tensor: Tensor) -> bool:
    """Whether Triton and e4m3 products serve the tensor's device."""
    return runs_triton(tensor) and _has_fp8(tensor.device.index)


@torch.compiler.assume_constant_result
def _has_fp8(device_index: int | None) -> bool:
    return capability(device_index) >= OLDEST_CAPABILITY


def rows(dy: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor]:
    """e4m3 rows of dY with a power of two each; arguments and results of the reference."""
    if compiled.takes_rows(dy.shape[-1]) or not has_kernels(dy):
        return reference.fp8_rows(dy, fold)
    values, scale = torch.ops.sparse_bitnet.fp8_rows(dy, fold)
    return values, scale


def _transposed(values: Tensor, factor: Tensor | None) -> Tensor:
    if not has_kernels(values):
        return reference.fp8_transposed(values, factor)
    return torch.ops.sparse_bitnet.fp8_transposed(values, factor)


def _matmul(a: Tensor, b: Tensor, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if not has_kernels(a):
        return reference.fp8_matmul(a, b, scale, out_dtype)
    return torch.ops.sparse_bitnet.fp8_matmul(a, b, scale, out_dtype)


_ones: dict[torch.device, Tensor] = {}


def _one(device: torch.device) -> Tensor:
    if device in _ones:
        return _ones[device]
    one = torch.ones((), dtype=torch.float32, device=device)
    if not torch.cuda.is_current_stream_capturing():  # memory of a captured graph stays its own
        _ones[device] = one
    return one


def _triton() -> Any:
    from sparse_bitnet.kernels.backward import triton_fp8

    return triton_fp8


def _cuda_matmul(a: Tensor, b: Tensor, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    one = _one(a.device)
    scales = {"scale_a": one if scale is None else scale, "scale_b": one}
    fast = scale is None
    return torch._scaled_mm(a, b.t(), **scales, out_dtype=out_dtype, use_fast_accum=fast)


register(
    "fp8_rows(Tensor dy, Tensor? fold) -> (Tensor, Tensor)",
    lambda dy, fold: _triton().rows(dy, fold),
    lambda dy, fold: (
        dy.new_empty(dy.shape, dtype=reference.FP8),
        dy.new_empty(dy.shape[:1], dtype=torch.float32),
    ),
)
register(
    "fp8_transposed(Tensor values, Tensor? factor) -> Tensor",
    lambda values, factor: _triton().transposed(values, factor),
    lambda values, factor: values.new_empty(values.shape[::-1], dtype=reference.FP8),
)
register(
    "fp8_matmul(Tensor a, Tensor b, Tensor? scale, ScalarType out_dtype) -> Tensor",
    _cuda_matmul,
    lambda a, b, scale, out_dtype: a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype),
)
