"""(2L−2):2L sparsity as 2:4 sparsity over overlapping windows (SlideSparse, arXiv 2603.05232).

A group of 2L weights with at most 2L−2 non-zeros becomes L−1 windows of four lanes each, at
lane offsets 0, 2, 4, …, every window with at most two non-zeros: left to right, each non-zero goes
into the first window that covers it and has room. Activations are lifted, their lanes repeated in
the order in which windows visit them, so that the product is unchanged.

Why it always fits. Call lanes 2p and 2p+1 pair p, so window w covers pairs w and w+1. Window p
meets pair p first and has room for both its weights, so only the last pair, L−1, which has no
window of its own, can be refused. Say that it is: window L−2 is full, and with at most one weight
of pair L−1 in it, it holds a weight of pair L−2. That one came there because window L−3 was full,
holding at most one weight of pair L−2, the other being the one that moved on; so it holds one of
pair L−3, and so on down to window 0. All L−1 windows are full and one weight is left over: 2L−1
non-zeros, one more than the pattern allows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.errors import PatternError, WeightError
from sparse_bitnet.core.pattern import LARGEST_GROUP, Pattern

WINDOW = 4


def _check_group(group: int, columns: int) -> None:
    if group < WINDOW or group % 2 or columns % group:
        raise PatternError(
            f"windows: a group of {group} lanes is no (2L−2):2L group of a row of {columns}; "
            "the group must be even, at least 4, and divide the row"
        )


def window_order(group: int) -> list[int]:
    """The lanes of one group in the order of its windows: 0 1 2 3, 2 3 4 5, …"""
    return [first + lane for first in range(0, group - 2, 2) for lane in range(WINDOW)]


def group_for(pattern: Pattern, columns: int) -> int | None:
    """The smallest window group that holds every weight of this pattern, None if there is none.

    N:M fits groups of 2L lanes if M divides 2L and the 2L/M groups together hold at most 2L−2
    non-zeros; so 6:8 takes 8, 4:8 takes 8, 7:8 takes 16 (as 14:16), 4:6 takes 6.
    """
    for group in range(WINDOW, LARGEST_GROUP + 1, 2):
        fits = group % pattern.m == 0 and group // pattern.m * pattern.n <= group - 2
        if fits and columns % group == 0:
            return group
    return None


def lift(values: Tensor, group: int) -> Tensor:
    """Repeat lanes in window order: ``[..., in]`` → ``[..., in·(2·group − 4)/group]``.

    Raises:
        PatternError: if ``group`` is odd, below 4, or does not divide ``in``.
    """
    _check_group(group, values.shape[-1])
    order = torch.tensor(window_order(group), device=values.device)
    return values.unflatten(-1, (-1, group)).index_select(-1, order).flatten(-2)


def encode(ternary: Tensor, group: int) -> Tensor:
    """Ternary weight → the equal weight over windows, 2:4 everywhere.

    Args:
        ternary: int8 ``[..., in]`` with at most ``group`` − 2 non-zeros in every group of lanes.
        group: 2L.

    Returns:
        int8 ``[..., in·(2·group − 4)/group]``; its product with lifted activations equals that of
        ``ternary`` with plain ones.

    Raises:
        PatternError: if ``group`` is odd, below 4, or does not divide ``in``.
        WeightError: if a group holds more than ``group`` − 2 non-zeros; none is ever dropped.
    """
    _check_group(group, ternary.shape[-1])
    lanes = ternary.unflatten(-1, (-1, group))
    windows = group // 2 - 1
    count = (lanes != 0).sum(-1)
    if count.numel() and int(count.max()) > group - 2:
        row, column = divmod(int(count.flatten().argmax()), count.shape[-1])
        raise WeightError(
            f"windows: row {row}, lanes {column * group}–{column * group + group - 1}: "
            f"{int(count.max())} non-zeros in a group of {group}, at most {group - 2} fit; "
            f"the weight does not keep to {group - 2}:{group}, mask it before packing"
        )
    out = torch.zeros(
        (*lanes.shape[:-1], windows, WINDOW), dtype=ternary.dtype, device=lanes.device
    )
    held = torch.zeros((*lanes.shape[:-1], windows), dtype=torch.int8, device=lanes.device)
    for lane in range(group):
        value = lanes[..., lane]
        waiting = value != 0
        for window in (lane // 2 - 1, lane // 2):
            if 0 <= window < windows:
                placed = waiting & (held[..., window] < 2)
                out[..., window, lane - 2 * window] = value * placed
                held[..., window] += placed
                waiting = waiting & ~placed
    return out.flatten(-3)


def decode(windows: Tensor, group: int) -> Tensor:
    """The inverse of :func:`encode`: each weight is the sum of its (at most one non-zero) copies.

    Raises:
        PatternError: if ``group`` is odd or below 4, or its windows do not divide the row.
    """
    width = 2 * group - WINDOW
    if group < WINDOW or group % 2 or windows.shape[-1] % width:
        raise PatternError(
            f"windows: a row of {windows.shape[-1]} is no multiple of {width}, the windows of a "
            f"group of {group}"
        )
    copies = windows.unflatten(-1, (-1, width))
    out = torch.zeros((*copies.shape[:-1], group), dtype=windows.dtype, device=windows.device)
    order = torch.tensor(window_order(group), device=windows.device)
    return out.index_add_(-1, order, copies).flatten(-2)
