"""The reference's arithmetic a chunk of rows at a time, for matrices larger than the caches.

The mask takes M passes over its operands. Over a large matrix each pass goes through memory, most
of it fresh pages, which cost more than the arithmetic; over a chunk in the cache it does not. A
chunk is also below the size from which PyTorch hands an operation to its threads, which only wait
for each other over so little work. So one thread takes half the processor time of two over the
whole matrix, is hardly slower, and needs no memory but the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_bitnet.core.mask import nm_mask
from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.core.ternary import (
    SMALLEST_SCALE,
    check_segments,
    row_scale,
)

CHUNK_WEIGHTS = 2**15
FEWEST_WEIGHTS = 2**21
"""Below this the reference's temporaries stay in the caches, and its threads help."""


def serves(weight: Tensor) -> bool:
    """On the CPU, and large."""
    return weight.device.type == "cpu" and weight.numel() >= FEWEST_WEIGHTS


def ternarize(
    weight: Tensor, pattern: Pattern, segments: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """The published method; arguments, results and errors of ``core.ternarize``."""
    pattern.check_divides(weight.shape[-1])
    check_segments(segments, weight.shape[-2])
    weight = weight.detach()
    sums = weight.new_empty(weight.shape[:-1], dtype=torch.float64)
    for part, out in _chunks(weight, sums.unsqueeze(-1)):
        out.copy_(part.abs().sum(dim=-1, keepdim=True, dtype=torch.float64))
    lengths = segments or (weight.shape[-2],)
    means = [
        part.sum(dim=-1) / max(1, rows * weight.shape[-1])
        for part, rows in zip(sums.split(lengths, dim=-1), lengths, strict=True)
    ]
    scale = torch.stack(means, dim=-1).float().clamp(min=SMALLEST_SCALE)
    scales = row_scale(scale, segments, weight.shape[-2]).contiguous().unsqueeze(-1)
    ternary = torch.empty(weight.shape, dtype=torch.int8)
    for part, row_scales, out in _chunks(weight, scales, ternary):
        # round_ternary by comparisons: halves round to even, so 0.5 to 0. PyTorch's round threads
        # even over a chunk.
        relative = part.float() / row_scales
        ternary_part = (relative > 0.5).view(torch.int8) - (relative < -0.5).view(torch.int8)
        if not pattern.is_dense:
            ternary_part *= nm_mask(part, pattern)
        out.copy_(ternary_part)
    return ternary, scale


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all ``[..., n]`` tensors, as many as fit the first one's chunk."""
    columns = tensors[0].shape[-1]
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    step = max(1, CHUNK_WEIGHTS // max(1, columns))
    for first in range(0, rows[0].shape[0] if columns else 0, step):
        yield tuple(tensor[first : first + step] for tensor in rows)
