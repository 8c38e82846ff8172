"""The compiled library's ternary weights on every path that this processor has."""

import pytest
import torch

from sparse_bitnet.core import DENSE, Method, Pattern, PatternError
from sparse_bitnet.core import ternarize as reference
from sparse_bitnet.formats import two_bit
from sparse_bitnet.kernels import native, ternarize
from sparse_bitnet.kernels.ternarize import cpu, two_bits


@pytest.fixture(params=native.available(), autouse=True)
def path(request):
    with native.forced(request.param):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "pattern", [DENSE, Pattern(6, 8), Pattern(1, 32), Pattern(2, 4), Pattern(3, 16)]
)
@pytest.mark.parametrize(
    ("shape", "shard_sizes"),
    [
        ((1, 32), ()),
        ((37, 64), ()),
        ((37, 2080), (30, 1, 6)),
        ((3, 10, 32), ()),
        ((3, 10, 32), (5, 5)),
        ((0, 32), ()),
        ((2, 0), ()),
        ((300, 4128), ()),
    ],
)
def test_equals_the_reference(shape, shard_sizes, pattern, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(*shape[:-1], 1)).to(dtype)
    weight[..., ::3] = 0.5  # ties
    assert cpu.serves(weight)
    ternary, scale = ternarize(weight, pattern, None, shard_sizes)
    expected, expected_scale = reference(weight, pattern, None, shard_sizes)
    assert ternary.dtype == torch.int8 and torch.equal(ternary, expected)
    assert torch.equal(scale, expected_scale)
    for given in (None, scale):
        packed, _ = two_bits(weight, pattern, Method(), shard_sizes, given)
        assert torch.equal(two_bit.unpack_rows(packed, shape[-1]), expected)


def test_halves_round_to_even():
    """With γ = 1 exactly: 0.5 to 0, 1.5 to 2 and so to 1, and their neighbours."""
    near = torch.tensor([0.5, 1.5, 0.0, 1.0, 3.0, 1e-38, 1e-45])
    near = torch.cat([near, near.nextafter(torch.tensor(9.0)), near.nextafter(torch.tensor(-9.0))])
    values = torch.cat([near, -near])
    weight = torch.cat([values, torch.full((64 - len(values),), 0.0)])
    weight[-1] = 64 - weight.double().abs().sum()
    weight = weight.reshape(2, 32)
    assert reference(weight, DENSE)[1].item() == pytest.approx(1.0)
    for found, expected in zip(ternarize(weight, DENSE), reference(weight, DENSE), strict=True):
        assert torch.equal(found, expected)


def test_neighbours_of_half_of_any_scale():
    """Comparing with γ/2 rounds as the quotient does: one unit in the last place on both sides."""
    torch.manual_seed(0)
    for _ in range(200):
        half = float(torch.rand(()) * 10 ** torch.randint(-4, 3, ()).item())
        edge = torch.tensor(half)
        near = [edge, edge.nextafter(torch.tensor(9e9)), edge.nextafter(torch.tensor(0.0))]
        rest = torch.full((29,), 0.0)
        weight = torch.cat([torch.stack(near), rest])
        weight[-1] = 64 * edge.double() - weight.double().abs().sum()  # so that γ/2 is the edge
        weight = weight.reshape(1, 32)
        found, expected = ternarize(weight, DENSE), reference(weight, DENSE)
        assert torch.equal(found[0], expected[0])


def test_values_that_are_not_finite():
    """A weight that diverged comes out as the reference has it."""
    weight = torch.randn(4, 16)
    weight[1, 3], weight[2, 5], weight[3, 0] = float("nan"), float("inf"), float("-inf")
    for pattern in (DENSE, Pattern(6, 8), Pattern(3, 16)):
        found, expected = ternarize(weight, pattern), reference(weight, pattern)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1]) or found[1].isnan() == expected[1].isnan()


def test_strided_weights_wide_weights_and_ablations():
    weight = torch.randn(64, 40).t()
    for method in (None, Method(mask_source="quantized"), Method(order="mask-then-quant")):
        for version in (weight, weight.double()):
            found = ternarize(version, Pattern(6, 8), method)
            expected = reference(version, Pattern(6, 8), method)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_pattern_that_does_not_divide():
    with pytest.raises(PatternError, match="in_features 12 is not a multiple of M = 8"):
        ternarize(torch.randn(4, 12), Pattern(6, 8))
