# ruff: noqa: RUF005  (Triton's language concatenates tuples, it does not unpack them)
# mypy: disable-error-code="no-untyped-def,assignment"
"""Casts to e4m3: rows with a scale each, in one pass; and tiles that are transposed on the way.

Tensor cores read both fp8 operands along the contracted dimension, so whatever is contracted along
its rows has to be turned first. Scales are powers of two, so scaling never rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST_BITS = tl.constexpr((127 - 100 + 7) << 23)  # 2⁻¹⁰⁰ · 2⁷
INFINITY_BITS = tl.constexpr(0x7F800000)
HEADROOM_BITS = tl.constexpr(7 << 23)
WIDEST_CHUNK = 4096


class Tile(NamedTuple):
    """What one program turns: rows and columns of what it reads, and its warps."""

    rows: int
    columns: int
    warps: int


TILE = Tile(128, 128, 4)


@triton.jit
def power_and_inverse(bits):
    """A row's scale (NaN if not finite) and its inverse, from the bits of its largest magnitude."""
    finite = bits < INFINITY_BITS
    power = ((bits & INFINITY_BITS) - HEADROOM_BITS).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, tl.div_rn(1.0, power), 1.0)
    return tl.where(finite, power, float("nan")), inverse


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
    power, inverse = power_and_inverse(tl.max(largest))
    tl.store(scale_ptr + row, power)
    for i in tl.static_range(CHUNKS):
        lanes = i * CHUNK + tl.arange(0, CHUNK)
        scaled = (values[i] * inverse).to(tl.float8e4nv)
        tl.store(values_ptr + lanes, scaled, mask=lanes < columns)


@triton.jit
def _fourth(
    values_ptr, factor_ptr, at, inside, row, columns, K: tl.constexpr, FACTOR: tl.constexpr
):
    """Row 4·row + K of the tile in float32, multiplied by its factor."""
    values = tl.load(values_ptr + at + K * columns, mask=inside).to(tl.float32)
    if FACTOR:
        values *= tl.load(factor_ptr + row * 4 + K)[:, None]
    return values


@triton.jit
def _e4m3_word(a, b, c, d, ASM: tl.constexpr):
    """Four float32 as e4m3 in one word, the first lowest."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    low = _byte(a) | (_byte(b) << 8)
    return low | (_byte(c) << 16) | (_byte(d) << 24)


@triton.jit
def _byte(x):
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _transpose_kernel(
    values_ptr,
    factor_ptr,
    out_ptr,
    rows,
    columns,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ASM: tl.constexpr,
):
    # Four rows of a column are one word of the result, so that whole words change threads.
    words = rows // 4
    word = tl.program_id(0) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (word < words)[:, None] & (column < columns)[None, :]
    at = word.to(tl.int64)[:, None] * (4 * columns) + column[None, :]
    row = tl.minimum(word, words - 1)
    packed = _e4m3_word(
        _fourth(values_ptr, factor_ptr, at, inside, row, columns, 0, FACTOR),
        _fourth(values_ptr, factor_ptr, at, inside, row, columns, 1, FACTOR),
        _fourth(values_ptr, factor_ptr, at, inside, row, columns, 2, FACTOR),
        _fourth(values_ptr, factor_ptr, at, inside, row, columns, 3, FACTOR),
        ASM,
    )
    out_at = out_ptr + column.to(tl.int64)[:, None] * words + word[None, :]
    tl.store(out_at, tl.trans(packed), mask=tl.trans(inside))


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


def transposed(values: Tensor, factor: Tensor | None, tile: Tile = TILE) -> Tensor:
    """Launch; arguments and results as ``reference.fp8_transposed``. Four divides the rows."""
    values = values.contiguous()
    count, columns = values.shape
    out = torch.empty((columns, count), dtype=torch.float8_e4m3fn, device=values.device)
    if out.numel() == 0:
        return out
    _transpose_kernel[(triton.cdiv(count, tile.rows), triton.cdiv(columns, tile.columns))](
        values,
        None if factor is None else factor.contiguous(),
        out.view(torch.int32),
        count,
        columns,
        FACTOR=factor is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        ASM=values.is_cuda,
        num_warps=tile.warps,
    )
    return out
