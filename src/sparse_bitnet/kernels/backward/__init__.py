"""The two products of a layer's backward pass, from what its forward kept."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels.backward import fp8, reference
from sparse_bitnet.kernels.library import register

__all__ = ["gradients"]

HALVES = (torch.bfloat16, torch.float16)


def gradients(
    dy: Tensor,
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    *,
    one_scale: bool = False,
    use_fp8: bool = False,
    needs: tuple[bool, bool] = (True, True),
    weight_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor | None, Tensor | None]:
    """dX = dY @ (γT) and dW = dYᵀ @ (x_scale·Xq).

    Args:
        dy: ``[..., out]``, float; the products run in its dtype.
        x_q: int8 ``[..., in]``.
        x_scale: float32 ``[..., 1]``.
        ternary: int8 ``[out, in]``.
        w_scale: float32 ``[out]``, γ of every row.
        one_scale: all rows have the same γ; spares the weight operand a rounding.
        use_fp8: run both products in e4m3 where the sizes allow; see ``fp8.py``. For bf16, float16
            and float32 gradients.
        needs: whether dX and dW are wanted.
        weight_dtype: of dW.

    Returns:
        ``(dX [..., in], dW [out, in])``, None for what is not wanted. On CUDA a float32 dW is
        stored from the product's own float32 sums, without a rounding to bf16 between.
    """
    rows, x_rows = dy.reshape(-1, dy.shape[-1]), x_q.reshape(-1, x_q.shape[-1])
    if use_fp8 and dy.dtype != torch.float64 and fp8.serves(rows.shape[0], *ternary.shape):
        dx, dw = fp8.gradients(rows, x_rows, x_scale, ternary, w_scale, one_scale, needs)
    else:
        dx = reference.input_gradient(rows, ternary, w_scale, one_scale) if needs[0] else None
        dw = _weight_gradient(rows, x_rows, x_scale, weight_dtype) if needs[1] else None
    if dx is not None:
        dx = dx.reshape(x_q.shape)
    return dx, None if dw is None else dw.to(weight_dtype)


def _weight_gradient(dy: Tensor, x_q: Tensor, x_scale: Tensor, dtype: torch.dtype) -> Tensor:
    x = reference.dequantized(x_q, x_scale.reshape(-1, 1), dy.dtype)
    if dy.is_cuda and dy.dtype in HALVES and dtype == torch.float32:
        return torch.ops.sparse_bitnet.weight_gradient(dy, x)
    return reference.weight_gradient(dy, x, dtype)


register(
    "weight_gradient(Tensor dy, Tensor x) -> Tensor",
    lambda dy, x: torch.mm(dy.t(), x, out_dtype=torch.float32),
    lambda dy, x: dy.new_empty((dy.shape[1], x.shape[1]), dtype=torch.float32),
)
