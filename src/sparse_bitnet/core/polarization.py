"""Why ternary weights tolerate N:M: training polarizes the master weights around −γ, 0 and +γ.

A group's pruning threshold is the magnitude of the largest weight that its mask removes. Weights
below γ/2 round to zero anyway (the dead zone), so a group whose threshold lies there loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_bitnet.core.mask import nm_mask
from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.core.ternary import absmean, row_scale

# In units of γ.
HISTOGRAM_END = 4.0  # what lies beyond is counted in the last bin
DEAD_ZONE = 0.5  # half rounds to even, so γ/2 itself becomes zero


@dataclass(frozen=True)
class Polarization:
    """Statistics of one weight matrix."""

    edges: list[float]  # of the bins of |w|/γ, bins + 1 values from 0 to 4
    magnitudes: list[float]  # fraction of weights in each bin (the last one: and above)
    thresholds: list[float]  # fraction of groups, by pruning threshold / γ; zeros if dense
    zeros_before_mask: float  # fraction of weights that round to zero unmasked (|w| ≤ γ/2)
    # Fraction of groups whose threshold is in the dead zone, so that the mask changes none of their
    # ternary values; 1.0 if dense.
    dead_zone_groups: float
    # Fourth standardized moment of the weights relative to their γ, signs included (3 for a
    # Gaussian, lower when polarized, 0 if all weights are equal).
    kurtosis: float


def pruning_thresholds(weight: Tensor, pattern: Pattern) -> Tensor:
    """Magnitude of the largest weight each group loses: ``[..., out, in/M]``; empty if dense.

    Raises:
        PatternError: if M does not divide ``in``.
    """
    if pattern.is_dense:
        return weight.new_empty((*weight.shape[:-1], 0))
    lost = weight.detach().abs().masked_fill(nm_mask(weight, pattern), 0)
    return lost.unflatten(-1, (-1, pattern.m)).amax(-1)


def polarization(
    weight: Tensor, pattern: Pattern, shard_sizes: tuple[int, ...] = (), bins: int = 80
) -> Polarization:
    """Measure how far a master weight ``[..., out, in]`` has polarized.

    Raises:
        PatternError: if M does not divide ``in``.
    """
    rows = row_scale(absmean(weight, shard_sizes), shard_sizes, weight.shape[-2]).unsqueeze(-1)
    relative = weight.detach().float() / rows
    thresholds = pruning_thresholds(weight, pattern).float() / rows
    return Polarization(
        edges=torch.linspace(0, HISTOGRAM_END, bins + 1, dtype=torch.float64).tolist(),
        magnitudes=_fractions(relative.abs(), bins),
        thresholds=_fractions(thresholds, bins),
        zeros_before_mask=_fraction(relative.abs() <= DEAD_ZONE),
        dead_zone_groups=1.0 if pattern.is_dense else _fraction(thresholds <= DEAD_ZONE),
        kurtosis=_kurtosis(relative),
    )


def _fraction(which: Tensor) -> float:
    return int(which.sum()) / max(1, which.numel())


def _fractions(values: Tensor, bins: int) -> list[float]:
    # Integer counts: a float32 histogram cannot count beyond 2²⁴ weights in a bin.
    index = (values.flatten() * (bins / HISTOGRAM_END)).clamp(max=bins - 1).long()
    return (torch.bincount(index, minlength=bins).double() / max(1, values.numel())).tolist()


def _kurtosis(values: Tensor) -> float:
    """In float64: the fourth power of what float32 holds does not fit into float32."""
    centred = values.double()
    centred = centred - centred.mean()
    variance = (centred**2).mean().item()
    return (centred**4).mean().item() / variance**2 if variance > 0 else 0.0
