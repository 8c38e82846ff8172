"""Triton's interpreter does not round to e4m3 as a GPU does (a carry into the exponent is lost), so
values here are e4m3's own normal ones; tests/gpu/ rounds."""

import pytest
import torch

from sparse_bitnet.kernels.backward import reference, triton_fp8


def representable(*shape):
    """Four significant bits at most, eight octaves; zeros too."""
    return torch.randint(-15, 16, shape) * torch.exp2(torch.randint(-4, 4, shape).float())


def same_bits(ours, theirs):
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((0, 8), torch.float32),
        ((1, 1), torch.bfloat16),
        ((5, 100), torch.float32),
        ((5, 100), torch.bfloat16),
        ((2, 4097), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("fold", [False, True])
def test_rows(shape, dtype, fold):
    dy = (representable(*shape) * torch.exp2(-torch.arange(shape[0]).float())[:, None]).to(dtype)
    factors = torch.exp2(torch.randint(-2, 1, shape[1:]).float()) if fold else None
    values, scale = triton_fp8.rows(dy, factors)
    expected, expected_scale = reference.fp8_rows(dy, factors)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(values.float(), expected.float())


def test_rows_at_the_edges():
    dy = torch.zeros(6, 32)
    dy[1, 3] = 1e-38
    dy[2] = 448.0
    dy[3, 0], dy[3, 1] = 2.0, -1.875
    dy[4, 7] = torch.nan
    dy[5, 7] = torch.inf
    values, scale = triton_fp8.rows(dy, None)
    expected, expected_scale = reference.fp8_rows(dy, None)
    assert torch.equal(scale[:4], expected_scale[:4])
    assert torch.isnan(scale[4:]).all()
    assert torch.isnan(expected_scale[4:]).all()
    assert torch.equal(values[:4].float(), expected[:4].float())


def test_odd_magnitudes_have_the_scale_of_the_reference():
    dy = torch.randn(7, 33) * torch.exp2(torch.arange(-60, 10, 10).float())[:, None]
    assert torch.equal(triton_fp8.rows(dy, None)[1], reference.fp8_rows(dy, None)[1])


@pytest.mark.parametrize(
    ("shape", "kind", "factored"),
    [((132, 70), kind, factored) for kind in ("ternary", "int8") for factored in (False, True)]
    + [(shape, "fp8", True) for shape in ((4, 1), (128, 128), (16, 300), (260, 129), (0, 4))]
    + [((132, 70), "fp8", False)],
)
def test_transposed(shape, kind, factored):
    if kind == "fp8":
        values = representable(*shape).to(reference.FP8)
    elif kind == "int8":
        values = (torch.randint(-16, 16, shape) * 8).to(torch.int8)
    else:
        values = torch.randint(-1, 2, shape, dtype=torch.int8)
    factor = torch.exp2(-(torch.arange(shape[0]) % 3).float()) if factored else None
    ours = triton_fp8.transposed(values, factor)
    assert torch.equal(ours.float(), reference.fp8_transposed(values, factor).float())
