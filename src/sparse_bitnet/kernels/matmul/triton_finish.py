# mypy: disable-error-code="no-untyped-def,assignment"
"""The token scale and the bias, applied in place to a product that lacks them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048


@triton.jit
def _finish_kernel(y_ptr, x_scale_ptr, bias_ptr, columns, BIAS: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = n < columns
    at = y_ptr + row * columns + n
    y = tl.load(at, mask=inside).to(tl.float32) * tl.load(x_scale_ptr + row)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


def finish(y: Tensor, x_scale: Tensor, bias: Tensor | None) -> None:
    """y ← y · x_scale + bias, for contiguous ``y`` ``[tokens, out]``, ``x_scale`` ``[tokens]``."""
    if y.numel() == 0:
        return
    _finish_kernel[(y.shape[0], triton.cdiv(y.shape[1], CHUNK))](
        y,
        x_scale,
        bias,
        y.shape[1],
        BIAS=bias is not None,
        CHUNK=CHUNK,
        num_warps=4,
        enable_fp_fusion=False,
    )
