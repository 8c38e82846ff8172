# ruff: noqa: RUF005  (Triton's language concatenates tuples, it does not unpack them)
# mypy: disable-error-code="no-untyped-def,assignment"
"""Casts to e4m3: rows with a scale each, in one pass; and tiles that are transposed on the way.

Tensor cores read both fp8 operands along the contracted dimension, so whatever is contracted along
its rows has to be turned first. Scales are powers of two, so scaling never rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST_BITS = tl.constexpr((127 - 100 + 7) << 23)  # 2⁻¹⁰⁰ · 2⁷
INFINITY_BITS = tl.constexpr(0x7F800000)
HEADROOM_BITS = tl.constexpr(7 << 23)
WIDEST_CHUNK = 4096
TILE = 128


@triton.jit
def _rows_kernel(
    dy_ptr,
    fold_ptr,
    values_ptr,
    scale_ptr,
    columns,
    stride,
    FOLD: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * stride
    values_ptr += row * columns
    values = ()
    largest = tl.full((CHUNK,), SMALLEST_BITS, tl.int32)
    for i in tl.static_range(CHUNKS):
        lanes = i * CHUNK + tl.arange(0, CHUNK)
        value = tl.load(dy_ptr + lanes, mask=lanes < columns, other=0.0).to(tl.float32)
        if FOLD:
            value *= tl.load(fold_ptr + lanes, mask=lanes < columns, other=0.0)
        # Bit patterns order as magnitudes do and let a NaN through.
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        values = values + (value,)
    bits = tl.max(largest)
    finite = bits < INFINITY_BITS
    power = ((bits & INFINITY_BITS) - HEADROOM_BITS).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, tl.where(finite, power, float("nan")))
    inverse = tl.where(finite, tl.div_rn(1.0, power), 1.0)
    for i in tl.static_range(CHUNKS):
        lanes = i * CHUNK + tl.arange(0, CHUNK)
        scaled = (values[i] * inverse).to(tl.float8e4nv)
        tl.store(values_ptr + lanes, scaled, mask=lanes < columns)


@triton.jit
def _transpose_kernel(
    values_ptr,
    factor_ptr,
    out_ptr,
    rows,
    columns,
    FACTOR: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = values_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tile = tl.load(at, mask=inside).to(tl.float32)
    if FACTOR:
        tile *= tl.load(factor_ptr + row, mask=row < rows, other=0.0)[:, None]
    out_at = out_ptr + column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_at, tl.trans(tile.to(tl.float8e4nv)), mask=tl.trans(inside))


def rows(dy: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch; arguments and results as ``reference.fp8_rows``."""
    tokens, columns = dy.shape
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    values = torch.empty((tokens, columns), dtype=torch.float8_e4m3fn, device=dy.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=dy.device)
    if tokens == 0:
        return values, scale
    chunk = max(64, min(WIDEST_CHUNK, triton.next_power_of_2(columns)))
    _rows_kernel[(tokens,)](
        dy,
        fold,
        values,
        scale,
        columns,
        dy.stride(0),
        FOLD=fold is not None,
        CHUNK=chunk,
        CHUNKS=triton.cdiv(columns, chunk),
        num_warps=max(1, min(8, chunk // 512)),
    )
    return values, scale


def transposed(values: Tensor, factor: Tensor | None) -> Tensor:
    """Launch; arguments and results as ``reference.fp8_transposed``."""
    values = values.contiguous()
    count, columns = values.shape
    out = torch.empty((columns, count), dtype=torch.float8_e4m3fn, device=values.device)
    if out.numel() == 0:
        return out
    _transpose_kernel[(triton.cdiv(count, TILE), triton.cdiv(columns, TILE))](
        values, factor, out, count, columns, FACTOR=factor is not None, TILE=TILE, num_warps=8
    )
    return out
