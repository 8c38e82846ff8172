"""Both packings against a slow, obvious loop, and against bytes they never write."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import ConfigError, PackedFormatError, WeightError
from sparse_bitnet.formats import STORAGES, rows, storage

BASE = {"two-bit": (4, 4), "trits": (5, 3)}  # weights a byte, base of the code


def slow_pack(row, per_byte, base):
    padded = row + [0] * (-len(row) % per_byte)
    return [
        sum((w + 1) * base**place for place, w in enumerate(padded[start : start + per_byte]))
        for start in range(0, len(padded), per_byte)
    ]


@pytest.fixture(params=sorted(STORAGES))
def form(request):
    return STORAGES[request.param]


ternary_rows = st.integers(0, 70).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([-1, 0, 1]), min_size=length, max_size=length),
        min_size=1,
        max_size=5,
    )
)


@pytest.mark.parametrize("name", sorted(STORAGES))
@settings(deadline=None, max_examples=60)
@given(matrix=ternary_rows)
def test_equals_the_slow_loop_and_inverts(name, matrix):
    form = STORAGES[name]
    weight = torch.tensor(matrix, dtype=torch.int8).reshape(len(matrix), -1)
    packed = form.pack(weight, "w")
    expected = [slow_pack(row, *BASE[name]) for row in matrix]
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(matrix), form.packed_length(weight.shape[1]))
    assert packed.tolist() == expected
    assert torch.equal(form.unpack(packed, weight.shape[1], "w"), weight)


@pytest.mark.parametrize("shape", [(7,), (0,), (0, 9), (3, 0), (2, 3, 41), (1, 1, 1, 1)])
def test_any_leading_dimensions(form, shape):
    weight = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = form.pack(weight, "w")
    assert packed.shape[:-1] == weight.shape[:-1]
    assert torch.equal(form.unpack(packed, shape[-1], "w"), weight)


def test_many_chunks_and_strided_input(form, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_BYTES", 100)
    weight = torch.randint(-1, 2, (37, 64), dtype=torch.int8).t()
    before = weight.clone()
    packed = form.pack(weight, "w")
    assert torch.equal(form.unpack(packed, 37, "w"), weight)
    assert torch.equal(weight, before)  # inputs are not modified
    weight = torch.randint(-1, 2, (3, 37), dtype=torch.int8)
    weight[2, 30] = 2
    with pytest.raises(WeightError, match="row 2 holds 2 at input 30"):
        form.pack(weight, "layer")


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.uint8), torch.tensor(1, dtype=torch.int8)],
)
def test_pack_refuses_what_is_not_int8(form, weight):
    with pytest.raises(WeightError, match="packing needs an int8 tensor"):
        form.pack(weight, "layer")


@pytest.mark.parametrize("value", [2, -2, 127, -128])
def test_pack_refuses_what_is_not_ternary(form, value):
    weight = torch.zeros(3, 9, dtype=torch.int8)
    weight[1, 8] = value
    with pytest.raises(WeightError, match=f"layer: row 1 holds {value} at input 8"):
        form.pack(weight, "layer")


@pytest.mark.parametrize("name", sorted(STORAGES))
@pytest.mark.parametrize("length", [5, 8, 13, 20])
def test_every_byte_is_either_written_by_pack_or_refused(name, length):
    """Exhaustive over the last byte of a row, padding included."""
    form = STORAGES[name]
    per_byte, base = BASE[name]
    used = length % per_byte or per_byte
    legal = set()
    for digits in torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * used).reshape(-1, used):
        legal.add(slow_pack(digits.tolist(), per_byte, base)[0])
    filler = form.pack(torch.zeros(length, dtype=torch.int8), "w")
    for last in range(256):
        packed = filler.clone()
        packed[-1] = last
        if last in legal:
            again = form.pack(form.unpack(packed, length, "w"), "w")
            assert torch.equal(again, packed)
        else:
            with pytest.raises(PackedFormatError, match=f"row 0, byte {len(packed) - 1} is {last}"):
                form.unpack(packed, length, "w")


def test_check_names_row_and_byte_beyond_the_first_chunk(form, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_BYTES", 16)
    packed = form.pack(torch.zeros(50, 40, dtype=torch.int8), "w")
    packed[33, 2] = 255
    with pytest.raises(PackedFormatError, match=r"q_proj: row 33, byte 2 is 255.*pack it again"):
        form.check(packed, 40, "q_proj")


@pytest.mark.parametrize("change", ["dtype", "long", "short", "scalar"])
def test_unpack_refuses_other_shapes_and_dtypes(form, change):
    packed = form.pack(torch.zeros(3, 21, dtype=torch.int8), "w")
    packed = {
        "dtype": lambda p: p.to(torch.int8),
        "long": lambda p: torch.cat([p, p[:, :1]], 1),
        "short": lambda p: p[:, :-1],
        "scalar": lambda p: p[0, 0],
    }[change](packed)
    with pytest.raises(PackedFormatError, match=r"down_proj: 21 weights a row are stored in uint8"):
        form.unpack(packed, 21, "down_proj")


def test_unknown_storage():
    assert storage("trits") is STORAGES["trits"]
    with pytest.raises(ConfigError, match=r"storage is 'four-bit'; choose among \('two-bit', 'tri"):
        storage("four-bit")
