import itertools
import math

import pytest

from sparse_bitnet.core import DENSE, Pattern
from sparse_bitnet.packed.sizes import least_bits, readable_bytes


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 4), Pattern(1, 6), Pattern(5, 8)])
def test_least_bits_counts_the_groups(pattern):
    groups = itertools.product([-1, 0, 1], repeat=pattern.m)
    states = sum(1 for group in groups if sum(map(abs, group)) <= pattern.n)
    assert least_bits(pattern) == pytest.approx(math.log2(states) / pattern.m)


def test_least_bits_of_the_published_patterns():
    found = [round(least_bits(p), 3) for p in (Pattern(2, 4), Pattern(3, 4), Pattern(6, 8), DENSE)]
    assert found == [1.261, 1.506, 1.546, 1.585]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (27240, "27.2 kB"), (5.44e9, "5.44 GB"), (1.5e6, "1.5 MB")],
)
def test_readable_bytes(count, text):
    assert readable_bytes(count) == text
