"""Four rows in a byte, compared with transformers' own packing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.bitnet import pack_weights, unpack_weights

from sparse_bitnet.core import ConfigError, PackedFormatError, WeightError
from sparse_bitnet.formats import row_quarters


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_bytes_are_those_of_transformers(quarter, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    ternary = torch.randint(-1, 2, (4 * quarter, columns), generator=generator).to(torch.int8)
    before = ternary.clone()
    packed = row_quarters.pack(ternary)
    assert torch.equal(ternary, before)
    assert torch.equal(row_quarters.unpack(packed), ternary)
    if quarter:
        assert torch.equal(packed, pack_weights(ternary.clone()))
        assert torch.equal(unpack_weights.__wrapped__(packed, torch.int8), ternary)


def test_bytes_that_are_refused():
    with pytest.raises(ConfigError, match="layer: 6 rows are not a multiple of 4"):
        row_quarters.pack(torch.zeros(6, 2, dtype=torch.int8), "layer")
    with pytest.raises(WeightError, match="row 1 holds 2"):
        row_quarters.pack(torch.tensor([[0], [2], [0], [0]], dtype=torch.int8))
    with pytest.raises(PackedFormatError, match="layer: row 1, byte 0 is 12"):
        row_quarters.unpack(torch.tensor([[0], [12]], dtype=torch.uint8), "layer")
    with pytest.raises(PackedFormatError):
        row_quarters.unpack(torch.zeros(2, 2))
