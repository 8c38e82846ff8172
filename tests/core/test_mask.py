"""N:M masks against a sort in Python: odd shapes, ties, hostile values, other dtypes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import (
    DENSE,
    Pattern,
    PatternError,
    nm_mask,
    worst_group,
)

PATTERNS = st.integers(1, 32).flatmap(lambda m: st.integers(1, m).map(lambda n: Pattern(n, m)))


@given(data=st.data(), pattern=PATTERNS, rows=st.integers(1, 3), groups=st.integers(1, 3))
@settings(deadline=None, max_examples=120)
def test_equals_the_loop(slow, data, pattern, rows, groups):
    weight = data.draw(slow.tensors(rows, groups * pattern.m))
    mask = nm_mask(weight, pattern)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, slow.mask(weight, pattern.n, pattern.m))
    assert (mask.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 16), (3, 5, 16), (16,), (2, 3, 4, 8)])
def test_any_dtype_and_number_of_dimensions(slow, dtype, shape):
    weight = torch.randn(shape).to(dtype)  # 8 bits of mantissa: ties abound
    assert torch.equal(nm_mask(weight, Pattern(6, 8)), slow.mask(weight, 6, 8))


def test_ties_go_to_the_lower_index():
    equal = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    assert nm_mask(equal, Pattern(3, 8)).tolist() == [True] * 3 + [False] * 5
    zeros = torch.tensor([-0.0, 0.0, 0.0, -0.0])
    assert nm_mask(zeros, Pattern(2, 4)).tolist() == [True, True, False, False]
    late = torch.tensor([1.0, 2.0, 2.0, 2.0])
    assert nm_mask(late, Pattern(2, 4)).tolist() == [False, True, True, False]


def test_denormals_are_told_apart():
    weight = torch.tensor([0.0, 1e-45, 3e-45, 1e-44])
    assert nm_mask(weight, Pattern(2, 4)).tolist() == [False, False, True, True]


def test_float64_is_not_rounded():
    weight = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert nm_mask(weight, Pattern(1, 2)).tolist() == [False, True]


def test_views_without_contiguous_memory(slow):
    base = torch.randn(16, 12)
    for weight in (base.t(), base[:, ::3].repeat(1, 2)[:, ::1], torch.randn(4, 32)[:, ::2]):
        assert torch.equal(nm_mask(weight, Pattern(2, 4)), slow.mask(weight, 2, 4))
    expanded = torch.randn(8).expand(3, 8)
    assert torch.equal(nm_mask(expanded, Pattern(6, 8)), slow.mask(expanded, 6, 8))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (0, 4, 8), (2, 0, 8)])
def test_empty(shape):
    assert nm_mask(torch.empty(shape), Pattern(6, 8)).shape == shape


def test_dense_keeps_everything_whatever_divides():
    assert nm_mask(torch.zeros(3, 7), DENSE).all()
    assert nm_mask(torch.zeros(3, 7), Pattern(8, 8)).all()


def test_refuses_a_row_that_m_does_not_divide():
    with pytest.raises(PatternError, match="in_features 12 is not a multiple of M = 8"):
        nm_mask(torch.zeros(3, 12), Pattern(6, 8))


def test_leaves_the_weight_and_its_graph_alone():
    weight = torch.randn(2, 8, requires_grad=True)
    before = weight.detach().clone()
    assert not nm_mask(weight, Pattern(6, 8)).requires_grad
    assert torch.equal(weight, before)


@given(data=st.data(), m=st.integers(1, 32), rows=st.integers(1, 4), groups=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_worst_group_equals_the_loop(data, m, rows, groups):
    size = rows * groups * m
    values = data.draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=size, max_size=size))
    fullest = max(sum(v != 0 for v in values[i : i + m]) for i in range(0, size, m))
    ternary = torch.tensor(values, dtype=torch.int8).reshape(rows, groups * m)
    assert worst_group(ternary, m) == fullest


def test_worst_group_edges():
    assert worst_group(torch.empty(0, 8), 8) == 0
    with pytest.raises(PatternError, match="in_features 9 is not a multiple of M = 8"):
        worst_group(torch.ones(3, 9), 8)
