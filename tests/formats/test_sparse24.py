import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import PackedFormatError, Pattern, PatternError, WeightError, ternarize
from sparse_bitnet.formats import sparse24


def slow_pack(row):
    values, bits = [], []
    for start in range(0, len(row), 4):
        four = row[start : start + 4]
        non_zero = [i for i in range(4) if four[i]]
        free = [i for i in range(4) if not four[i]]
        chosen = sorted((non_zero + free)[:2])
        values += [four[i] for i in chosen]
        bits += chosen
    lanes = [sum(bits[i + j] << 2 * j for j in range(4)) for i in range(0, len(bits), 4)]
    return values, lanes


FOURS = [
    list(four) for four in itertools.product((-1, 0, 1), repeat=4) if sum(v != 0 for v in four) <= 2
]
eights = st.tuples(st.sampled_from(FOURS), st.sampled_from(FOURS)).map(lambda two: two[0] + two[1])


@settings(deadline=None, max_examples=100)
@given(st.lists(eights, min_size=1, max_size=6))
def test_pack_equals_the_slow_loop(groups):
    row = [v for group in groups for v in group]
    ternary = torch.tensor([row], dtype=torch.int8)
    values, lanes = sparse24.pack(ternary)
    assert (values[0].tolist(), lanes[0].tolist()) == slow_pack(row)
    assert torch.equal(sparse24.unpack(values, lanes), ternary)


@pytest.mark.parametrize("name", ["2:4", "1:4", "2:8", "2:16", "1:2"])
def test_patterns_that_ride_on_2_4(name):
    ternary, _ = ternarize(torch.randn(3, 5, 64), Pattern.parse(name))
    assert sparse24.fits(ternary)
    assert torch.equal(sparse24.unpack(*sparse24.pack(ternary)), ternary)


def test_a_four_that_breaks_the_pattern_is_an_error_not_a_drop():
    ternary = torch.zeros(2, 16, dtype=torch.int8)
    ternary[1, 4:7] = 1
    assert not sparse24.fits(ternary)
    with pytest.raises(WeightError, match="3 non-zeros in four lanes, at most 2 fit"):
        sparse24.pack(ternary)


def test_refuses_rows_of_no_multiple_of_eight():
    with pytest.raises(PatternError, match="not a multiple of 8"):
        sparse24.pack(torch.zeros(2, 12, dtype=torch.int8))
    assert not sparse24.fits(torch.zeros(2, 6, dtype=torch.int8))


def test_refuses_damaged_files():
    values, lanes = sparse24.pack(torch.zeros(2, 16, dtype=torch.int8))
    with pytest.raises(PackedFormatError, match="do not belong together"):
        sparse24.unpack(values[:, :4], lanes)
    with pytest.raises(PackedFormatError, match="twice or out of order"):
        sparse24.unpack(values, torch.zeros_like(lanes))


def test_empty():
    values, lanes = sparse24.pack(torch.zeros(0, 16, dtype=torch.int8))
    assert sparse24.unpack(values, lanes).shape == (0, 16)
