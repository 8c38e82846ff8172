"""γ, rounding and the masked ternary weight against loops in Python, ablations included."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import (
    DENSE,
    Method,
    Pattern,
    WeightError,
    absmean,
    check_finite,
    method_mask,
    nm_mask,
    round_ternary,
    row_scale,
    scale_of,
    scale_sums,
    ternarize,
    ternarize_with,
    worst_group,
    zero_matrices,
)

PATTERNS = st.sampled_from([Pattern(*p) for p in [(6, 8), (2, 4), (1, 2), (1, 8), (7, 8), (3, 5)]])
ABLATIONS = [Method(), Method(mask_source="quantized"), Method(order="mask-then-quant")]
METHODS = st.sampled_from(ABLATIONS)


def compare(slow, weight, pattern, method, shard_sizes):
    """Each matrix of the leading dimensions and each segment, on its own."""
    ternary, scale = ternarize(weight, pattern, method, shard_sizes)
    assert ternary.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert ternary.shape == weight.shape
    parts = shard_sizes or (weight.shape[-2],)
    assert scale.shape == (*weight.shape[:-2], len(parts))
    for index in itertools.product(*(range(size) for size in weight.shape[:-2])):
        start = 0
        for segment, rows in enumerate(parts):
            part = weight[index][start : start + rows].float()
            got = ternary[index][start : start + rows]
            start += rows
            one = scale[index][segment].item()
            values = part.flatten().tolist()
            if pattern.is_dense:
                kept = torch.ones_like(part, dtype=torch.bool)
            elif method.mask_source == "quantized":
                rounded = [slow.ternary(v, one) for v in values]
                kept = slow.mask(torch.tensor(rounded).reshape(part.shape), pattern.n, pattern.m)
            else:
                kept = slow.mask(part, pattern.n, pattern.m)
            among = values
            if method.order == "mask-then-quant":
                among = [v for v, k in zip(values, kept.flatten().tolist(), strict=True) if k]
            assert one == pytest.approx(slow.gamma(among), rel=1e-6)
            expected = [
                slow.ternary(v, one) if k else 0
                for v, k in zip(values, kept.flatten().tolist(), strict=True)
            ]
            assert got.flatten().tolist() == expected


@given(
    data=st.data(),
    pattern=PATTERNS,
    method=METHODS,
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
)
@settings(deadline=None, max_examples=80)
def test_equals_the_loop(slow, data, pattern, method, rows, groups):
    weight = data.draw(slow.tensors(rows, groups * pattern.m))
    compare(slow, weight, pattern, method, ())
    assert worst_group(ternarize(weight, pattern, method)[0], pattern.m) <= pattern.n


@given(
    data=st.data(), method=METHODS, shard_sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3)
)
@settings(deadline=None, max_examples=40)
def test_fused_shard_sizes_are_matrices_of_their_own(slow, data, method, shard_sizes):
    weight = data.draw(slow.tensors(sum(shard_sizes), 8))
    compare(slow, weight, Pattern(2, 4), method, tuple(shard_sizes))


@given(data=st.data(), method=METHODS, experts=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_experts_are_matrices_of_their_own(slow, data, method, experts):
    weight = data.draw(slow.tensors(experts, 4, 8))
    compare(slow, weight, Pattern(6, 8), method, ())
    compare(slow, weight, Pattern(6, 8), method, (1, 3))
    together, scale = ternarize(weight, Pattern(6, 8), method)
    for expert in range(experts):
        alone, own = ternarize(weight[expert], Pattern(6, 8), method)
        assert torch.equal(together[expert], alone)
        assert torch.equal(scale[expert], own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pattern", [Pattern(6, 8), DENSE, Pattern(8, 8)])
def test_other_dtypes_compute_in_float32(slow, dtype, pattern):
    compare(slow, torch.randn(5, 16).to(dtype), pattern, Method(), ())


def test_by_hand():
    """γ = 8/8 = 1: 1.6 and −1.5 become ±1, 0.5 is a tie and goes to the even zero."""
    weight = torch.tensor([[1.6, -1.5, 0.5, 0.6, -0.4, 2.0, 0.4, 1.0]])
    dense, scale = ternarize(weight, DENSE)
    assert scale.tolist() == [1.0]
    assert dense.tolist() == [[1, -1, 0, 1, 0, 1, 0, 1]]
    sparse, same = ternarize(weight, Pattern(3, 8))
    assert torch.equal(same, scale)  # γ is that of the dense weight
    assert sparse.tolist() == [[1, -1, 0, 0, 0, 1, 0, 0]]
    # The two −0.4 and 0.4 are what 6:8 removes, and they were zero before.
    assert torch.equal(ternarize(weight, Pattern(6, 8))[0], dense)
    # Mask first: γ is the mean of 1.6, 1.5 and 2.0, and the rest does not count.
    _, kept_only = ternarize(weight, Pattern(3, 8), Method(order="mask-then-quant"))
    assert kept_only.item() == pytest.approx(5.1 / 3)
    # From the quantized weight: the five ±1 tie, so the first three stay.
    ties, _ = ternarize(weight, Pattern(3, 8), Method(mask_source="quantized"))
    assert ties.tolist() == [[1, -1, 0, 1, 0, 0, 0, 0]]


def test_zeros_have_a_scale():
    ternary, scale = ternarize(torch.zeros(2, 8), Pattern(6, 8))
    assert not ternary.any()
    assert scale.item() == pytest.approx(1e-5)
    _, denormal = ternarize(torch.full((2, 8), 1e-45), Pattern(6, 8))
    assert denormal.item() == pytest.approx(1e-5)


def test_huge_weights_do_not_overflow():
    ternary, scale = ternarize(torch.full((64, 64), 3e38), Pattern(6, 8))
    assert scale.item() == pytest.approx(3e38)
    assert ternary.sum() == 64 * 64 * 6 // 8


def test_half_precision_sums_do_not_overflow():
    assert absmean(torch.full((64, 64), 60000.0).half()).item() == 60000.0


def test_gamma_does_not_depend_on_the_order_of_summation():
    weight = torch.randn(300, 64) * torch.logspace(-6, 6, 300).unsqueeze(1)
    gammas = {absmean(weight[torch.randperm(300)]).item() for _ in range(20)}
    assert len(gammas) == 1


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 4, 8), (2, 0, 8)])
@pytest.mark.parametrize("method", [Method(), Method(order="mask-then-quant")])
def test_empty(shape, method):
    ternary, scale = ternarize(torch.empty(shape), Pattern(6, 8), method)
    assert ternary.shape == shape
    assert scale.shape == (*shape[:-2], 1)
    assert (scale == 1e-5).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("method", ABLATIONS)
def test_shards_of_rows_add_up_to_the_matrix(ranks, method):
    """Sums of shards are added, and each shard then needs γ of its rows alone."""
    torch.manual_seed(0)
    weight, shard_sizes, pattern = torch.randn(17, 16), (9, 1, 7), Pattern(6, 8)
    expected, scale = ternarize(weight, pattern, method, shard_sizes)
    owner = torch.arange(3).repeat_interleave(torch.tensor(shard_sizes))
    length = -(-17 // ranks)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for rows, own in zip(weight.split(length), owner.split(length), strict=True):
        here = tuple(int((own == segment).sum()) for segment in range(3))
        mask = nm_mask(rows, pattern) if method.order == "mask-then-quant" else None
        sums += scale_sums(rows, here, mask)
    assert torch.equal(scale_of(sums), scale)
    parts = [
        ternarize_with(rows, scale[own], pattern, method)
        for rows, own in zip(weight.split(length), owner.split(length), strict=True)
    ]
    assert torch.equal(torch.cat(parts), expected)


def test_views_without_contiguous_memory():
    weight = torch.randn(16, 24).t()
    ternary, scale = ternarize(weight, Pattern(6, 8))
    again, same = ternarize(weight.contiguous(), Pattern(6, 8))
    assert torch.equal(ternary, again)
    assert torch.equal(scale, same)


def test_row_scale_repeats_each_segment():
    assert row_scale(torch.tensor([1.0, 2.0]), (1, 3), 4).tolist() == [1, 2, 2, 2]
    experts = row_scale(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (2, 1), 3)
    assert experts.tolist() == [[1, 1, 2], [3, 3, 4]]
    assert row_scale(torch.tensor([5.0]), (), 2).tolist() == [5, 5]


@pytest.mark.parametrize("shard_sizes", [(1, 2), (4, 1), (0, 4), (-1, 5)])
def test_refuses_shard_sizes_that_do_not_cut_the_rows(shard_sizes):
    with pytest.raises(WeightError, match=r"must be positive and sum to its 4 rows"):
        ternarize(torch.ones(4, 8), Pattern(6, 8), shard_sizes=shard_sizes)


def test_dense_has_no_mask():
    assert method_mask(torch.ones(2, 8), Pattern(8, 8), Method()) is None


def test_rounding_is_half_to_even():
    edge = torch.tensor([0.5, -0.5, 1.5, -1.5, 0.50000006])
    assert round_ternary(edge, torch.tensor(1.0)).tolist() == [0, 0, 1, -1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_check_finite_counts_and_names(bad):
    weight = torch.zeros(3, 4)
    check_finite(weight)
    weight[1, 2] = weight[0, 0] = bad
    with pytest.raises(WeightError, match=r"layer\.3: 2 of 12 values are NaN or infinite; .*take"):
        check_finite(weight, "layer.3")


def test_zero_matrices_are_those_without_a_ternary_weight():
    torch.manual_seed(0)
    weight = torch.randn(3, 6, 8)
    assert zero_matrices(weight) == zero_matrices(weight[0], (2, 4)) == []
    weight[1] = 0
    weight[2] = 5e-6  # γ is at least 1e-5, so this rounds to zero
    assert zero_matrices(weight) == ["[1]", "[2]"]
    assert zero_matrices(weight[1]) == [""]
    weight[0, 2:5] = -0.0
    assert zero_matrices(weight[0], (2, 3, 1)) == ["[2:5]"]
    for matrix, names in ((weight, ["[1]", "[2]"]), (weight[0], [])):
        ternary, _ = ternarize(matrix, Pattern.parse("2:4"))
        assert zero_matrices(ternary) == names
    weight[2, 5, 7] = 5.1e-6
    assert zero_matrices(weight) == ["[1]"]
    assert ternarize(weight[2], Pattern.parse("2:4"))[0].count_nonzero() == 1
