"""Polarization: examples by hand, loops in Python, and weights that break careless statistics."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import (
    DENSE,
    Method,
    Pattern,
    absmean,
    method_mask,
    polarization,
    pruning_thresholds,
    round_ternary,
    ternarize,
)


def test_by_hand():
    """Two groups of four, γ = 1; 2:4 removes (0.2, 0.4) and (0.6, 1.0)."""
    weight = torch.tensor([[1.6, -0.4, 0.2, 1.2, 1.0, -0.6, 1.3, -1.7]])
    assert absmean(weight).item() == 1.0
    assert pruning_thresholds(weight, Pattern(2, 4)).tolist() == [[pytest.approx(0.4), 1.0]]
    measured = polarization(weight, Pattern(2, 4), bins=8)
    assert measured.edges == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    assert measured.magnitudes == [2 / 8, 1 / 8, 3 / 8, 2 / 8, 0, 0, 0, 0]
    assert measured.thresholds == [1 / 2, 0, 1 / 2, 0, 0, 0, 0, 0]
    assert measured.zeros_before_mask == 2 / 8
    assert measured.dead_zone_groups == 1 / 2


def test_edges_by_hand():
    """|w| = γ/2 rounds to zero, so it belongs to the dead zone; beyond 4γ is the last bin."""
    edge = polarization(torch.tensor([[1.5, 0.5, -1.5, -0.5]]), Pattern(2, 4), bins=4)
    assert (edge.zeros_before_mask, edge.dead_zone_groups) == (0.5, 1.0)
    far = polarization(torch.tensor([[8.0] + [0.0] * 7]), Pattern(6, 8), bins=4)
    assert far.magnitudes == [7 / 8, 0, 0, 1 / 8]


def test_three_modes_by_hand():
    """Fully polarized: half the weights at ±2, half at 0. γ = 1, and 2:4 costs nothing."""
    weight = torch.tensor([[2.0, 0.0, -2.0, 0.0] * 4])
    measured = polarization(weight, Pattern(2, 4), bins=4)
    assert measured.magnitudes == [0.5, 0, 0.5, 0]
    assert measured.thresholds == [1, 0, 0, 0]
    assert (measured.zeros_before_mask, measured.dead_zone_groups) == (0.5, 1.0)
    assert measured.kurtosis == 2.0  # mean of w⁴ / (mean of w²)² = 8 / 2²


def test_gaussian():
    torch.manual_seed(0)
    measured = polarization(torch.randn(512, 512), Pattern(6, 8))
    assert measured.kurtosis == pytest.approx(3, abs=0.05)
    # P(|w| ≤ γ/2) with γ = √(2/π)
    assert measured.zeros_before_mask == pytest.approx(0.310, abs=0.005)
    assert sum(measured.magnitudes) == pytest.approx(1)
    assert sum(measured.thresholds) == pytest.approx(1)


def test_dense_has_no_thresholds():
    measured = polarization(torch.randn(4, 7), DENSE)
    assert pruning_thresholds(torch.randn(4, 7), DENSE).shape == (4, 0)
    assert set(measured.thresholds) == {0.0}
    assert measured.dead_zone_groups == 1.0


@given(data=st.data(), rows=st.integers(1, 4), groups=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_equals_the_loop(slow, data, rows, groups):
    weight = data.draw(slow.tensors(rows, 4 * groups))
    pattern = Pattern(2, 4)
    thresholds = pruning_thresholds(weight, pattern)
    lost = []
    for _, row in slow.rows_of(weight):
        for start in range(0, len(row), 4):
            group = row[start : start + 4]
            kept = slow.mask_row(group, 2, 4)
            lost.append(max(abs(v) for v, k in zip(group, kept, strict=True) if not k))
    assert thresholds.flatten().tolist() == lost
    measured = polarization(weight, pattern)
    dense, _ = ternarize(weight, DENSE)
    assert measured.zeros_before_mask == (dense == 0).double().mean()
    # A group whose threshold lies in the dead zone keeps its ternary values.
    same = (ternarize(weight, pattern)[0] == dense).unflatten(-1, (-1, 4)).all(-1)
    assert measured.dead_zone_groups == same.double().mean()
    assert sum(measured.magnitudes) == pytest.approx(1)


def test_kurtosis_equals_the_definition():
    weight = torch.randn(7, 8).exp()
    values = (weight / absmean(weight)).flatten().tolist()
    mean = statistics.fmean(values)
    variance = statistics.fmean((v - mean) ** 2 for v in values)
    expected = statistics.fmean((v - mean) ** 4 for v in values) / variance**2
    assert polarization(weight, Pattern(6, 8)).kurtosis == pytest.approx(expected, rel=1e-5)


def test_segments_and_experts_are_relative_to_their_own_scale():
    """The second matrix is ten times the first: alone they look the same."""
    one = torch.randn(4, 8)
    alone = polarization(one, Pattern(6, 8))
    fused = polarization(torch.cat([one, 10 * one]), Pattern(6, 8), shard_sizes=(4, 4))
    experts = polarization(torch.stack([one, 10 * one]), Pattern(6, 8))
    for both in (fused, experts):
        assert both.zeros_before_mask == alone.zeros_before_mask
        assert both.magnitudes == pytest.approx(alone.magnitudes)
        assert both.thresholds == pytest.approx(alone.thresholds)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 8),
        torch.ones(4, 8),
        torch.full((4, 8), 1e-45),
        torch.full((4, 8), 3e38),
        torch.tensor([[0.0] * 1023 + [3e38]]),
        torch.empty(0, 8),
    ],
    ids=["zeros", "ones", "denormal", "huge", "one outlier", "empty"],
)
def test_statistics_stay_finite(weight):
    measured = polarization(weight, Pattern(6, 8))
    figures = [*measured.magnitudes, *measured.thresholds, measured.kurtosis]
    figures += [measured.zeros_before_mask, measured.dead_zone_groups]
    assert torch.isfinite(torch.tensor(figures)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    weight = torch.randn(8, 16).to(dtype)
    measured = polarization(weight, Pattern(6, 8))
    rounded = round_ternary(weight, absmean(weight))
    assert measured.zeros_before_mask == (rounded == 0).double().mean()


def test_histogram_counts_beyond_float32():
    """A float32 histogram stops at 2²⁴; five sixths of these weights are in one bin."""
    size = 3 * 2**23
    weight = torch.zeros(3 * 2**3, 2**20)
    weight[: 2**2] = 1.0
    measured = polarization(weight, DENSE, bins=4)
    assert weight.numel() == size
    assert measured.magnitudes[0] == 5 / 6


def test_agrees_with_the_mask_in_force():
    weight = torch.randn(16, 32)
    mask = method_mask(weight, Pattern(6, 8), Method())
    lost = weight.abs().masked_fill(mask, 0).unflatten(-1, (-1, 8)).amax(-1)
    assert torch.equal(pruning_thresholds(weight, Pattern(6, 8)), lost)
