"""N:M masks: which weights of each group stay."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.pattern import Pattern


def nm_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Keep the N weights of largest magnitude in every group of M; ties go to the lower index.

    A weight's rank in its group is the number of weights that beat it: those of larger magnitude,
    and those of equal magnitude at a lower index. The kept ones have rank below N. Counting ranks
    compares every pair of a group once and needs no sort, so it is exact and stable. Lanes come
    first in memory meanwhile: each comparison then runs over contiguous values.

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
    magnitude = weight.detach().abs().unflatten(-1, (-1, pattern.m)).movedim(-1, 0).contiguous()
    # Every lane starts behind all earlier ones and passes those that it beats.
    lane = torch.arange(pattern.m, dtype=torch.int8, device=weight.device)
    rank = lane.view(-1, *[1] * (magnitude.dim() - 1)).repeat(1, *magnitude.shape[1:])
    for distance in range(1, pattern.m):
        passes = (magnitude[distance:] > magnitude[:-distance]).view(torch.int8)
        rank[distance:] -= passes
        rank[:-distance] += passes
    return (rank < pattern.n).movedim(0, -1).flatten(-2)


def worst_group(weight: Tensor, m: int) -> int:
    """The largest number of non-zeros in any group of ``m`` along the last dimension.

    Raises:
        PatternError: if ``m`` does not divide the last dimension.
    """
    Pattern(1, m).check_divides(weight.shape[-1])
    if weight.numel() == 0:
        return 0
    return int((weight != 0).unflatten(-1, (-1, m)).sum(-1).max())
