"""The reference's arithmetic a chunk of rows at a time.

The mask takes M passes over its operands. Over a whole matrix each of them goes through memory and
through fresh pages; over rows that fit the cache they do not, which is 1.7 times as fast, and a
large matrix needs little more memory than its result. γ still comes from the whole matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.mask import nm_mask
from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.core.ternary import absmean, round_ternary, row_scale

CHUNK_WEIGHTS = 2**18


def ternarize(
    weight: Tensor, pattern: Pattern, segments: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """The published method; arguments, results and errors of ``core.ternarize``."""
    pattern.check_divides(weight.shape[-1])
    scale = absmean(weight, segments)
    ternary = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    if weight.numel() == 0:
        return ternary, scale
    rows = weight.detach().reshape(-1, weight.shape[-1])
    scales = row_scale(scale, segments, weight.shape[-2]).reshape(-1, 1)
    filled = ternary.view(-1, weight.shape[-1])
    step = max(1, CHUNK_WEIGHTS // weight.shape[-1])
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step]
        chunk = round_ternary(part, scales[first : first + step])
        if not pattern.is_dense:
            chunk *= nm_mask(part, pattern)
        filled[first : first + step] = chunk
    return ternary, scale
