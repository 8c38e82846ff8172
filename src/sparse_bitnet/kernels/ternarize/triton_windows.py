# mypy: disable-error-code="no-untyped-def,assignment"
"""Ternary rows → the equal rows over windows, (2L−2):2L as 2:4, in one pass.

A thread holds a group: L pairs of lanes come in as 16-bit words, L−1 windows leave as 32-bit words.
The same greedy choice as ``formats.windows.encode``; the weight must keep to (2L−2):2L, which what
``ternarize`` returns does by construction. Nothing is checked here: a check waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUPS = 256  # a program's


@triton.jit
def _split(value, held):
    """What the earlier window still takes of a lane, what is left, and what it holds then."""
    taken = (value != 0) & (held < 2)
    return tl.where(taken, value, 0), tl.where(taken, 0, value), held + taken.to(tl.int32)


@triton.jit
def _encode_kernel(ternary_ptr, windows_ptr, count, L: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < count
    pairs_ptr = ternary_ptr.to(tl.pointer_type(tl.int16)) + group * L
    words_ptr = windows_ptr.to(tl.pointer_type(tl.int32)) + group * (L - 1)
    pair = tl.load(pairs_ptr, mask=inside, other=0).to(tl.int32) & 0xFFFF
    word = pair
    held = ((pair & 0xFF) != 0).to(tl.int32) + ((pair >> 8) != 0).to(tl.int32)
    for p in tl.static_range(1, L):
        pair = tl.load(pairs_ptr + p, mask=inside, other=0).to(tl.int32)
        low, low_left, held = _split(pair & 0xFF, held)
        high, high_left, held = _split((pair >> 8) & 0xFF, held)
        tl.store(words_ptr + (p - 1), word | (low << 16) | (high << 24), mask=inside)
        word = low_left | (high_left << 8)
        held = (low_left != 0).to(tl.int32) + (high_left != 0).to(tl.int32)


def encode(ternary: Tensor, group: int) -> Tensor:
    """``formats.windows.encode`` of a contiguous ternary ``[..., in]`` that keeps its pattern."""
    columns = ternary.shape[-1]
    width = columns // group * (2 * group - 4)
    windows = torch.empty((*ternary.shape[:-1], width), dtype=torch.int8, device=ternary.device)
    count = ternary.numel() // group
    if count:
        _encode_kernel[(triton.cdiv(count, GROUPS),)](
            ternary, windows, count, L=group // 2, GROUPS=GROUPS, num_warps=4
        )
    return windows
