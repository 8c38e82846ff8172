"""N:M masks: which weights of each group stay."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.pattern import Pattern


def nm_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Keep the N weights of largest magnitude in every group of M; ties go to the lower index.

    A weight's rank in its group is the number of weights that beat it: those of larger magnitude,
    and those of equal magnitude at a lower index. The kept ones have rank below N. Counting ranks
    takes M − 1 comparisons a weight and no sort, so it is exact, stable, and one fused loop when
    compiled.

    Args:
        weight: ``[..., in]``, any float dtype, finite; ``in`` a multiple of M.
        pattern: N:M.

    Returns:
        Boolean tensor of the weight's shape, True where the weight is kept.

    Raises:
        PatternError: if M does not divide the last dimension.

    Source: section 3 of arXiv 2603.05168; the tie rule is this package's, for reproducibility.
    """
    pattern.check_divides(weight.shape[-1])
    if pattern.is_dense:
        return torch.ones_like(weight, dtype=torch.bool)
    magnitude = weight.detach().abs().unflatten(-1, (-1, pattern.m))
    lanes = magnitude.unbind(-1)
    rank = torch.zeros_like(magnitude, dtype=torch.int8)
    for j, lane in enumerate(lanes):
        # Lane j beats the lanes before it only if larger, those after it also if equal.
        rank[..., :j] += lane.unsqueeze(-1) > magnitude[..., :j]
        rank[..., j + 1 :] += lane.unsqueeze(-1) >= magnitude[..., j + 1 :]
    return (rank < pattern.n).flatten(-2)


def flip_rate(before: Tensor, after: Tensor) -> float:
    """Fraction of mask entries that changed between two masks of one shape."""
    return (before != after).double().mean().item()


def worst_group(weight: Tensor, m: int) -> int:
    """The largest number of non-zeros in any group of ``m`` along the last dimension."""
    if weight.numel() == 0:
        return 0
    return int((weight != 0).unflatten(-1, (-1, m)).sum(-1).max())
