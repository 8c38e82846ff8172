# ruff: noqa: RUF005  (Triton's language concatenates tuples, it does not unpack them)
# mypy: disable-error-code="no-untyped-def,assignment"
"""Master weight → masked ternary weight in two passes over it.

1. Sum |w| of every row in float64; then, over row sums alone, γ of every logical matrix.
2. Round against γ/2, find the N largest magnitudes of every group, mask, and write int8.

γ stays a float64 sum, as in the reference, so its float32 value does not depend on the order.

Exactness. The reference rounds w/γ half to even and clips, so T ≠ 0 where w/γ, correctly rounded,
exceeds 1/2. That is the same as |w| > γ/2 in float32: halving is exact, and for the next float
above γ/2 the quotient lies more than 2⁻²⁵ above 1/2, half the spacing of floats there, so it rounds
to above 1/2. Magnitudes are compared as bit patterns, which order as they do.

Layout. A unit is the smallest run of groups that fills whole output words. Every program loads a
tile of units with coalesced accesses and splits it into one tensor a lane, so that all weights of a
group lie in one thread and comparing them is plain register instructions; `triton_select.py` does.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.core.ternary import SMALLEST_SCALE
from sparse_bitnet.kernels.ternarize.triton_select import (
    RANKED,
    at_least,
    lower_lanes_first,
    network,
    ranked,
)

SMALLEST = tl.constexpr(SMALLEST_SCALE)
TILE = 2048  # weights a program holds
WIDEST_UNIT = 32


@triton.jit
def _row_sums_kernel(weight_ptr, sums_ptr, columns, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight_ptr += row * columns
    total = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, columns, CHUNK):
        lanes = start + tl.arange(0, CHUNK)
        value = tl.load(weight_ptr + lanes, mask=lanes < columns, other=0.0)
        total += tl.abs(value.to(tl.float32)).to(tl.float64)
    tl.store(sums_ptr + row, tl.sum(total))


@triton.jit(do_not_specialize=["rows", "first", "shard"])
def _scale_kernel(
    sums_ptr,
    scale_ptr,
    row_scale_ptr,
    first,
    rows,
    rows_per_expert,
    shard,
    shards,
    columns,
    CHUNK: tl.constexpr,
):
    """γ of one shard of one expert, and γ again for each of its rows."""
    expert = tl.program_id(0)
    base = expert.to(tl.int64) * rows_per_expert + first
    total = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        total += tl.load(sums_ptr + base + row, mask=row < rows, other=0.0)
    count = rows.to(tl.float64) * columns
    gamma = (tl.sum(total) / count).to(tl.float32)
    # Written so that a NaN stays one.
    gamma = tl.where(gamma < SMALLEST, SMALLEST, gamma)
    tl.store(scale_ptr + expert * shards + shard, gamma)
    for start in range(0, rows, CHUNK):
        row = start + tl.arange(0, CHUNK)
        tl.store(
            row_scale_ptr + base + row, tl.zeros((CHUNK,), tl.float32) + gamma, mask=row < rows
        )


@triton.jit
def _split_lanes(tile, UNITS: tl.constexpr, UNIT: tl.constexpr, LEVELS: tl.constexpr):
    """``[UNITS, UNIT]`` → a tuple of UNIT tensors ``[UNITS]``."""
    parts = (tile,)
    for level in tl.static_range(LEVELS):
        even = ()
        odd = ()
        for p in tl.static_range(2**level):
            a, b = tl.split(tl.reshape(parts[p], (UNITS, UNIT >> (level + 1), 2)))
            even = even + (a,)
            odd = odd + (b,)
        parts = even + odd
    lanes = ()
    for p in tl.static_range(UNIT):
        lanes = lanes + (tl.reshape(parts[p], (UNITS,)),)
    return lanes


@triton.jit
def _word(codes, FIRST: tl.constexpr):
    """Four int8 codes in the bytes of one word."""
    word = codes[FIRST] & 0xFF
    word |= (codes[FIRST + 1] & 0xFF) << 8
    word |= (codes[FIRST + 2] & 0xFF) << 16
    return word | (codes[FIRST + 3] << 24)


@triton.jit
def _ternarize_kernel(
    weight_ptr,
    row_scale_ptr,
    out_ptr,
    columns,
    N: tl.constexpr,
    M: tl.constexpr,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    UNITS: tl.constexpr,
    DISTINCT: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight_ptr += row * columns
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    inside = unit < columns // UNIT
    half = (tl.load(row_scale_ptr + row) * 0.5).to(tl.int32, bitcast=True)
    if LEVELS > 0:
        lane = tl.arange(0, UNIT)
        tile = tl.load(
            weight_ptr + unit[:, None] * UNIT + lane[None, :], mask=inside[:, None], other=0.0
        )
        bits = _split_lanes(tile.to(tl.float32).to(tl.int32, bitcast=True), UNITS, UNIT, LEVELS)
    else:
        bits = ()
        for j in tl.static_range(UNIT):
            value = tl.load(weight_ptr + unit * UNIT + j, mask=inside, other=0.0)
            bits = bits + (value.to(tl.float32).to(tl.int32, bitcast=True),)
    keys = ()
    for i in tl.static_range(UNIT):
        keys = keys + (bits[i] & 0x7FFFFFFF,)
    ternary = ()
    for i in tl.static_range(UNIT):
        # Comparisons are sign bits of differences, which cannot overflow: keys are not negative.
        ternary = ternary + (((half - keys[i]) >> 31) & ((bits[i] >> 31) | 1),)
    at = row * columns
    if N == M:
        _store(out_ptr, ternary, at, unit, inside, UNIT, UNITS)
    elif M <= RANKED:
        _store(out_ptr, ranked(keys, ternary, N, M, UNITS), at, unit, inside, UNIT, UNITS)
    elif DISTINCT:
        ordered = ()
        for i in tl.static_range(UNIT):
            ordered = ordered + (keys[i] | (M - 1 - i % M),)
        codes, _ = at_least(ordered, ternary, N, M, HIGH, LOW, UNITS)
        _store(out_ptr, codes, at, unit, inside, UNIT, UNITS)
    else:
        codes, ties = at_least(keys, ternary, N, M, HIGH, LOW, UNITS)
        _store(out_ptr, codes, at, unit, inside, UNIT, UNITS)
        if tl.min(ties) < 0:
            codes = lower_lanes_first(keys, ternary, N, M, HIGH, LOW, UNITS)
            _store(out_ptr, codes, at, unit, inside, UNIT, UNITS)


@triton.jit
def _store(out_ptr, codes, start, unit, inside, UNIT: tl.constexpr, UNITS: tl.constexpr):
    """A tile of int8 codes, in words where units fill them."""
    words_ptr = (out_ptr + start).to(tl.pointer_type(tl.int32))
    if UNIT == 16:
        # Four words a thread in one 16-byte store.
        even = tl.join(_word(codes, 0), _word(codes, 8))
        odd = tl.join(_word(codes, 4), _word(codes, 12))
        words = tl.reshape(tl.join(even, odd), (UNITS, 4))
        at = words_ptr + unit[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(at, words, mask=inside[:, None])
    elif UNIT % 4 == 0:
        for w in tl.static_range(UNIT // 4):
            tl.store(words_ptr + unit * (UNIT // 4) + w, _word(codes, 4 * w), mask=inside)
    else:
        for k in tl.static_range(UNIT):
            tl.store(out_ptr + start + unit * UNIT + k, codes[k].to(tl.int8), mask=inside)


def _unit(m: int, columns: int) -> int:
    """The shortest run of groups that fills 16 bytes, else 8 or 4, and divides a row."""
    for multiple in (16, 8, 4):
        unit = math.lcm(m, multiple)
        if unit <= WIDEST_UNIT and columns % unit == 0:
            return unit
    return m


def ternarize(
    weight: Tensor,
    pattern: Pattern,
    shard_sizes: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Launch both passes on ``[..., out, in]``; the reference's results."""
    weight = weight.contiguous()
    *experts, out, columns = weight.shape
    count = math.prod(experts)
    parts = shard_sizes or (out,)
    device = weight.device
    scale = torch.empty((*experts, len(parts)), dtype=torch.float32, device=device)
    if weight.numel() == 0:
        return weight.to(torch.int8), scale.fill_(SMALLEST_SCALE)
    row_scale = torch.empty(count * out, dtype=torch.float32, device=device)
    sums = torch.empty(count * out, dtype=torch.float64, device=device)
    chunk = min(1024, triton.next_power_of_2(columns))
    _row_sums_kernel[(count * out,)](
        weight, sums, columns, CHUNK=chunk, num_warps=max(1, min(4, chunk // 256))
    )
    first = 0
    for index, rows in enumerate(parts):
        _scale_kernel[(count,)](
            sums,
            scale,
            row_scale,
            first,
            rows,
            out,
            index,
            len(parts),
            columns,
            CHUNK=1024,
            num_warps=8,
        )
        first += rows
    return ternarize_with(weight, row_scale, pattern), scale


def ternarize_with(weight: Tensor, row_scale: Tensor, pattern: Pattern) -> Tensor:
    """Launch the second pass on contiguous ``[..., out, in]``, with γ of every row."""
    columns = weight.shape[-1]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    row_scale = row_scale.reshape(-1).contiguous()
    n, m = (1, 1) if pattern.is_dense else (pattern.n, pattern.m)
    high, low = network(n, m) if m > RANKED.value else ((), ())
    unit = _unit(m, columns)
    units = max(32, min(TILE // unit, triton.next_power_of_2(columns // unit)))
    units = 1 << (units.bit_length() - 1)
    _ternarize_kernel[(weight.numel() // columns, triton.cdiv(columns // unit, units))](
        weight,
        row_scale,
        codes,
        columns,
        N=n,
        M=m,
        UNIT=unit,
        LEVELS=unit.bit_length() - 1 if unit & (unit - 1) == 0 else 0,
        UNITS=units,
        DISTINCT=weight.dtype.itemsize == 2,
        HIGH=high,
        LOW=low,
        num_warps=max(1, min(4, units // 32)),
    )
    return codes
