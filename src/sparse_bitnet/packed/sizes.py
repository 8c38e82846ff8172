"""Bits a weight, and sizes as text."""

from __future__ import annotations

import math

from sparse_bitnet.core import Pattern


def readable_bytes(count: float) -> str:
    """``27240`` → ``27.2 kB``; decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def least_bits(pattern: Pattern) -> float:
    """Bits a weight that any lossless code needs for ternary weights with at most N of M non-zero.

    A group has sum over k ≤ N of C(M, k)·2ᵏ states: 5281 for 6:8, so 1.546 bits a weight; 1.585
    if dense. Rarer states may make an entropy code shorter on average.
    """
    states = sum(math.comb(pattern.m, k) * 2**k for k in range(pattern.n + 1))
    return math.log2(states) / pattern.m
