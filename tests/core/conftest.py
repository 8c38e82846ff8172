"""The method once more, as slow and obvious loops over Python numbers: the reference for core."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

# Ties, signed zeros, denormals, the dead zone's edge and the ends of float32, beside common values.
HOSTILE = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-5, 1e-45, -1e-45, 1e-38, 3e38, -3e38]


def numbers():
    common = st.floats(min_value=-4, max_value=4, width=32)
    return st.one_of(st.sampled_from(HOSTILE), common, st.floats(-(2.0**127), 2.0**127, width=32))


@st.composite
def tensors(draw, *shape):
    size = math.prod(shape)
    values = draw(st.lists(numbers(), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def rows_of(weight):
    """(index, values) of every row, in float32 whatever the weight's dtype."""
    for index in itertools.product(*(range(size) for size in weight.shape[:-1])):
        yield index, weight[index].float().tolist()


def mask_row(row, n, m):
    """Sort each group by magnitude, then index; keep the first n."""
    kept = [False] * len(row)
    for start in range(0, len(row), m):
        lanes = range(start, start + m)
        for lane in sorted(lanes, key=lambda i: (-abs(row[i]), i))[:n]:
            kept[lane] = True
    return kept


def mask(weight, n, m):
    result = torch.empty(weight.shape, dtype=torch.bool)
    for index, row in rows_of(weight):
        result[index] = torch.tensor(mask_row(row, n, m), dtype=torch.bool)
    return result


def gamma(values):
    """Mean magnitude in exact arithmetic."""
    return max(math.fsum(abs(v) for v in values) / max(1, len(values)), 1e-5)


def ternary(value, scale):
    """round() of Python rounds half to even, too."""
    with np.errstate(over="ignore"):
        ratio = float(np.float32(value) / np.float32(scale))
    return max(-1, min(1, round(max(-9.0, min(9.0, ratio)))))


@pytest.fixture(scope="session")
def slow():
    return SimpleNamespace(
        tensors=tensors,
        rows_of=rows_of,
        mask=mask,
        mask_row=mask_row,
        gamma=gamma,
        ternary=ternary,
    )
