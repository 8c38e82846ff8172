# ruff: noqa: RUF005  (Triton's language concatenates tuples, it does not unpack them)
# mypy: disable-error-code="no-untyped-def,assignment"
"""Master weight → masked ternary weight in two bits, in two passes over it.

1. Sum |w| of every logical matrix in float64, as up to ``PARTIALS`` sums of as many pieces.
2. Add those up to γ, round against γ/2, find the N largest magnitudes of every group, mask, and
   write ``formats.two_bit``. Where ranks hold rows each, γ is made in between and handed in.

γ stays a float64 sum, as in the reference, so its float32 value does not depend on the order.

Exactness. The reference rounds w/γ half to even and clips, so T ≠ 0 where w/γ, correctly rounded,
exceeds 1/2. That is the same as |w| > γ/2 in float32: halving is exact, and for the next float
above γ/2 the quotient lies more than 2⁻²⁵ above 1/2, half the spacing of floats there, so it rounds
to above 1/2. Magnitudes are compared as bit patterns, which order as they do.

Layout. A unit is the smallest run of groups that fills whole bytes, better whole words, of the
result. Every program loads a tile of units with coalesced accesses and splits it into one tensor a
lane, so that all weights of a group lie in one thread and comparing them is plain register
instructions; `triton_select.py` does.
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
    network,
    ranked,
    selected,
)

SMALLEST = tl.constexpr(SMALLEST_SCALE)
PARTIALS = 256  # sums of a large matrix, a program each: two for every multiprocessor
CHUNK = 2048
TILE = 2048  # weights a program holds


@triton.jit(do_not_specialize=["part", "first"])
def _sums_kernel(
    weight_ptr, sums_ptr, stride, columns, first, count, length, part, parts, CHUNK: tl.constexpr
):
    """Σ|w| and how many, of the program's piece of one shard of one expert."""
    piece, pieces = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    expert, experts = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    weight_ptr += expert * stride + first.to(tl.int64) * columns
    start = piece * length
    end = tl.minimum(start + length, count)
    total = tl.zeros((CHUNK,), tl.float64)
    for at in range(start, end, CHUNK):
        lanes = at + tl.arange(0, CHUNK)
        # Pieces are whole chunks, so only the last piece ends inside of one.
        value = tl.load(weight_ptr + lanes, mask=lanes < count, other=0.0)
        total += tl.abs(value.to(tl.float32)).to(tl.float64)
    sums_ptr += (expert * parts + part) * pieces + piece
    tl.store(sums_ptr, tl.sum(total))
    tl.store(sums_ptr + experts * parts * pieces, tl.maximum(end - start, 0).to(tl.float64))


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
def _byte(codes, FIRST: tl.constexpr):
    """Four codes −1, 0, 1 in the bit pairs of a byte, as 0, 1, 2."""
    pairs = codes[FIRST] + (codes[FIRST + 1] << 2)
    return pairs + (codes[FIRST + 2] << 4) + (codes[FIRST + 3] << 6) + 0x55


@triton.jit(do_not_specialize=["first", "part"])
def _ternarize_kernel(
    weight_ptr,
    sums_ptr,
    scale_ptr,
    packed_ptr,
    rows,
    first,
    columns,
    part,
    parts,
    N: tl.constexpr,
    M: tl.constexpr,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    UNITS: tl.constexpr,
    DISTINCT: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    PIECES: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    row = expert * rows + first + tl.program_id(0)
    at_scale = expert * parts + part
    if PIECES:
        piece = sums_ptr + at_scale * PIECES + tl.arange(0, PIECES)
        counts = piece + tl.num_programs(2).to(tl.int64) * parts * PIECES
        gamma = (tl.sum(tl.load(piece)) / tl.sum(tl.load(counts))).to(tl.float32)
        gamma = tl.where(gamma < SMALLEST, SMALLEST, gamma)  # written so that a NaN stays one
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(scale_ptr + at_scale, gamma)
    else:
        gamma = tl.load(scale_ptr + at_scale)
    weight_ptr += row * columns
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    inside = unit < columns // UNIT
    half = (gamma * 0.5).to(tl.int32, bitcast=True)
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
    packed_ptr += row * (columns // 4)
    if N == M:
        _store(packed_ptr, ternary, unit, inside, UNIT, UNITS)
    elif M <= RANKED:
        _store(packed_ptr, ranked(keys, ternary, N, M, UNITS), unit, inside, UNIT, UNITS)
    elif DISTINCT:
        ordered = ()
        for i in tl.static_range(UNIT):
            ordered = ordered + (keys[i] | (M - 1 - i % M),)
        codes, _ = selected(ordered, ternary, N, M, HIGH, LOW, UNITS, False)
        _store(packed_ptr, codes, unit, inside, UNIT, UNITS)
    else:
        codes, ties = selected(keys, ternary, N, M, HIGH, LOW, UNITS, False)
        _store(packed_ptr, codes, unit, inside, UNIT, UNITS)
        if tl.min(ties) < 0:
            codes, _ = selected(keys, ternary, N, M, HIGH, LOW, UNITS, True)
            _store(packed_ptr, codes, unit, inside, UNIT, UNITS)


@triton.jit
def _store(packed_ptr, codes, unit, inside, UNIT: tl.constexpr, UNITS: tl.constexpr):
    """A tile of codes in two bits each, in words where units fill them."""
    if UNIT % 16 == 0:
        words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + unit * (UNIT // 16)
        for w in tl.static_range(UNIT // 16):
            word = _byte(codes, 16 * w) | (_byte(codes, 16 * w + 4) << 8)
            word |= (_byte(codes, 16 * w + 8) << 16) | (_byte(codes, 16 * w + 12) << 24)
            tl.store(words_ptr + w, word, mask=inside)
    else:
        for b in tl.static_range(UNIT // 4):
            at = packed_ptr + unit * (UNIT // 4) + b
            tl.store(at, _byte(codes, 4 * b).to(tl.uint8), mask=inside)


def _unit(m: int, columns: int) -> int:
    """The shortest run of groups that fills a word of the result, half of one or a byte, divides a
    row and fits a thread; 0 if there is none."""
    for multiple, widest in ((16, 16), (8, 32), (4, 64)):
        unit = math.lcm(m, multiple)
        if unit <= widest and columns % unit == 0:
            return unit
    return 0


def serves(pattern: Pattern, columns: int) -> bool:
    """Whether rows are whole bytes and a group is no wider than what a thread can hold."""
    return _unit(1 if pattern.is_dense else pattern.m, columns) > 0


def scale_sums(weight: Tensor, shard_sizes: tuple[int, ...] = ()) -> Tensor:
    """``core.scale_sums`` of contiguous ``[..., out, in]``, each as a few numbers to add up."""
    *experts, out, columns = weight.shape
    parts = shard_sizes or (out,)
    chunks = triton.cdiv(max(parts) * columns, CHUNK)
    pieces = min(PARTIALS, triton.next_power_of_2(max(1, chunks)))
    shape = (2, *experts, len(parts), pieces)
    sums = torch.empty(shape, dtype=torch.float64, device=weight.device)
    first = 0
    for part, rows in enumerate(parts):
        count = rows * columns
        _sums_kernel[(pieces, math.prod(experts))](
            weight,
            sums,
            out * columns,
            columns,
            first,
            count,
            triton.cdiv(triton.cdiv(count, pieces), CHUNK) * CHUNK,
            part,
            len(parts),
            CHUNK=CHUNK,
            num_warps=8,
        )
        first += rows
    return sums


def ternarize(
    weight: Tensor, pattern: Pattern, shard_sizes: tuple[int, ...], scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both passes on contiguous ``[..., out, in]``, or the second with a given γ ``[..., shards]``.

    Returns:
        ``(packed, scale)``: uint8 of ``formats.two_bit`` and float32 ``[..., shards]``.
    """
    *experts, out, columns = weight.shape
    parts = shard_sizes or (out,)
    packed = torch.empty(
        (*weight.shape[:-1], columns // 4), dtype=torch.uint8, device=weight.device
    )
    sums, pieces = None, 0
    if scale is None:
        sums = scale_sums(weight, shard_sizes)
        pieces = sums.shape[-1]
        scale = torch.empty((*experts, len(parts)), dtype=torch.float32, device=weight.device)
    n, m = (1, 1) if pattern.is_dense else (pattern.n, pattern.m)
    high, low = network(n, m) if m > RANKED.value else ((), ())
    unit = _unit(m, columns)
    units = max(32, min(TILE // unit, triton.next_power_of_2(columns // unit)))
    units = 1 << (units.bit_length() - 1)
    first = 0
    for part, rows in enumerate(parts):
        if not rows:  # of a shard that lies with other ranks
            continue
        _ternarize_kernel[(rows, triton.cdiv(columns // unit, units), math.prod(experts))](
            weight,
            scale if sums is None else sums,
            scale,
            packed,
            out,
            first,
            columns,
            part,
            len(parts),
            N=n,
            M=m,
            UNIT=unit,
            LEVELS=unit.bit_length() - 1 if unit & (unit - 1) == 0 else 0,
            UNITS=units,
            DISTINCT=weight.dtype.itemsize == 2,
            HIGH=high,
            LOW=low,
            PIECES=pieces,
            num_warps=max(1, min(4, units // 32)),
        )
        first += rows
    return packed, scale
