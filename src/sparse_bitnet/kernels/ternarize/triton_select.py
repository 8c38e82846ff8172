# ruff: noqa: RUF005  (Triton's language concatenates tuples, it does not unpack them)
# mypy: disable-error-code="no-untyped-def,assignment"
"""The N largest of every M weights, for groups whose weights lie in one thread.

Keys are magnitudes as bit patterns, a tuple of tensors, one a lane; ``ternary`` are the codes of
the same lanes before the mask. Of equal magnitudes the lower lanes stay, as in the reference.

Groups of up to eight are ranked, every weight against all others, M(M−1)/2 comparisons. In larger
ones a sorting network, of which only what leads to place N is kept, finds the N-th largest, τ: at
8:32 in a fifth of the instructions. Then |w| ≥ τ is the mask, unless some tie with τ:

- Weights of 16 bits leave the low 13 bits of a float32 free or more, and the lane goes there, lower
  lanes larger: nothing ties.
- Weights of 32 bits hardly ever tie. A program that counts more than N weights of a group masks its
  tile again, lane by lane, and writes it a second time. To look for ties costs 5 to 17 % of the
  bandwidth in groups of four and eight, which is why those are ranked.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

RANKED = tl.constexpr(8)  # the largest group whose weights are ranked


@triton.jit
def ranked(keys, ternary, N: tl.constexpr, M: tl.constexpr, UNITS: tl.constexpr):
    """The codes whose keys are among the N largest of their group, zeros for the others."""
    codes = ()
    for i in tl.static_range(len(keys)):
        # A lower lane wins unless strictly smaller, an upper lane if strictly larger. Each
        # difference appears for both its lanes, and the compiler computes it once.
        rank = tl.full((UNITS,), i % M - N, tl.int32)
        for j in tl.static_range(M):
            if i // M * M + j < i:
                rank += (keys[i // M * M + j] - keys[i]) >> 31
            if i // M * M + j > i:
                rank -= (keys[i] - keys[i // M * M + j]) >> 31
        codes = codes + (ternary[i] & (rank >> 31),)
    return codes


@triton.jit
def selected(
    keys,
    ternary,
    N: tl.constexpr,
    M: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    UNITS: tl.constexpr,
    TIES: tl.constexpr,
):
    """The codes whose keys reach the N-th largest; negative where those are more than N.

    With TIES, of those that equal the N-th largest only as many as fit.
    """
    codes = ()
    more = tl.full((UNITS,), 0, tl.int32)
    for g in tl.static_range(len(keys) // M):
        least = _nth_largest(keys[g * M : g * M + M], HIGH, LOW, N)
        room = tl.full((UNITS,), N, tl.int32)
        if TIES:
            for i in tl.static_range(g * M, g * M + M):
                room += (least - keys[i]) >> 31
        for i in tl.static_range(g * M, g * M + M):
            keep = (least - 1 - keys[i]) >> 31
            if TIES:
                larger = (least - keys[i]) >> 31
                equal = keep & ~larger & (-room >> 31)
                keep = larger | equal
                room += equal
            else:
                room += keep
            codes = codes + (ternary[i] & keep,)
        more |= room
    return codes, more


@triton.jit
def _exchanged(keys, HIGH: tl.constexpr, LOW: tl.constexpr):
    """The larger of two values of a tuple in place HIGH, the smaller in place LOW, behind it."""
    larger = tl.maximum(keys[HIGH], keys[LOW])
    smaller = tl.minimum(keys[HIGH], keys[LOW])
    return keys[:HIGH] + (larger,) + keys[HIGH + 1 : LOW] + (smaller,) + keys[LOW + 1 :]


@triton.jit
def _nth_largest(keys, HIGH: tl.constexpr, LOW: tl.constexpr, N: tl.constexpr):
    """The N-th largest of a tuple of tensors, by the comparators of :func:`network`."""
    for c in tl.static_range(len(HIGH)):
        keys = _exchanged(keys, HIGH[c], LOW[c])
    return keys[N - 1]


@cache
def network(n: int, m: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Comparators that leave the n-th largest of m values in place n − 1, in order.

    Batcher's merge exchange sort (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M)
    without the comparators that place does not depend on.

    Returns:
        The places of the larger and of the smaller value of every comparator.
    """
    pairs = []
    top = 1 << max(0, (m - 1).bit_length() - 1)
    p = top
    while p and m > 1:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(m - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    wanted, kept = {n - 1}, []
    for pair in reversed(pairs):
        if wanted.intersection(pair):
            wanted.update(pair)
            kept.append(pair)
    kept.reverse()
    return tuple(high for high, _ in kept), tuple(low for _, low in kept)
