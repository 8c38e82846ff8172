# mypy: disable-error-code="no-untyped-def,assignment"
"""The kernels of ``triton_two_bit.py``, in a file of their own: importing Triton takes a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels import pdl
from sparse_bitnet.kernels.pdl import wait

if TYPE_CHECKING:
    from sparse_bitnet.kernels.matmul.triton_two_bit import Tiles

CHUNK = 512


@triton.jit
def _product_kernel(
    x_ptr,
    bytes_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    sums_ptr,
    tokens,
    columns,
    row_bytes,
    inner,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    inside = n < columns
    row_ptr = bytes_ptr + tl.where(inside, n, 0).to(tl.int64) * row_bytes
    token_ptr = x_ptr + tl.where(t < tokens, t, 0).to(tl.int64) * inner
    total = tl.zeros((ROWS, TOKENS), tl.int32)
    wait(PDL)
    for start in range(tl.program_id(1) * BYTES, row_bytes, SPLITS * BYTES):
        byte = start + tl.arange(0, BYTES)
        packed = tl.load(
            row_ptr[:, None] + byte[None, :], mask=(byte < row_bytes)[None, :], other=0
        )
        for pair in tl.static_range(4):
            lane = byte // 16 * 64 + byte % 16 + 16 * pair
            x = tl.load(
                token_ptr[None, :] + lane[:, None],
                mask=(t < tokens)[None, :] & (lane < inner)[:, None],
                other=0,
            )
            plane = ((packed << (6 - 2 * pair)) & 0xC0).to(tl.int8, bitcast=True)
            total = tl.dot(plane, x, total, out_dtype=tl.int32)
    total = tl.trans(total) >> 6
    inside = (t < tokens)[:, None] & inside[None, :]
    where = t[:, None].to(tl.int64) * columns + n[None, :]
    if SPLITS > 1:
        slice_ptr = sums_ptr + tl.program_id(1).to(tl.int64) * tokens * columns
        tl.store(slice_ptr + where, total, mask=inside)
    else:
        x_scale = tl.load(x_scale_ptr + t, mask=t < tokens, other=0.0)
        w_scale = tl.load(w_scale_ptr + n, mask=n < columns, other=0.0)
        y = total.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
        if BIAS:
            y += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(
    sums_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    tokens,
    columns,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The slices' sums of a part of one token's row, added and scaled."""
    token = tl.program_id(0)
    n = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = n < columns
    wait(PDL)
    total = tl.zeros((CHUNK,), tl.int32)
    for split in tl.static_range(SPLITS):
        at = sums_ptr + (split * tokens + token).to(tl.int64) * columns + n
        total += tl.load(at, mask=inside, other=0)
    w_scale = tl.load(w_scale_ptr + n, mask=inside, other=0.0)
    y = total.to(tl.float32) * tl.load(x_scale_ptr + token) * w_scale
    if BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * columns + n, y.to(y_ptr.dtype.element_ty), mask=inside)


def run(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    tiles: Tiles,
) -> None:
    """Write Y; every tensor contiguous, ``y`` ``[tokens, out]``, ``packed`` of ``pack_rows``."""
    tokens, inner = x_q.shape
    columns, row_bytes = packed.shape
    if y.numel() == 0:
        return
    common = {
        "BIAS": bias is not None,
        "enable_fp_fusion": False,
        **pdl.launch_options(x_q),
    }
    sums = None
    if tiles.splits > 1:
        sums = torch.empty((tiles.splits, *y.shape), dtype=torch.int32, device=y.device)
    grid = (triton.cdiv(columns, tiles.rows), tiles.splits, triton.cdiv(tokens, tiles.tokens))
    _product_kernel[grid](
        x_q,
        packed,
        y,
        x_scale,
        w_scale,
        bias,
        sums,
        tokens,
        columns,
        row_bytes,
        inner,
        TOKENS=tiles.tokens,
        ROWS=tiles.rows,
        BYTES=tiles.bytes,
        SPLITS=tiles.splits,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **common,
    )
    if sums is not None:
        _sum_kernel[(tokens, triton.cdiv(columns, CHUNK))](
            sums,
            y,
            x_scale,
            w_scale,
            bias,
            tokens,
            columns,
            SPLITS=tiles.splits,
            CHUNK=CHUNK,
            num_warps=4,
            **common,
        )
