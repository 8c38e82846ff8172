"""The chunks of rows give what the whole matrix gives."""

import pytest
import torch

from sparse_bitnet.core import DENSE, Method, Pattern, PatternError
from sparse_bitnet.core import ternarize as reference
from sparse_bitnet.kernels import ternarize
from sparse_bitnet.kernels.ternarize import cpu


@pytest.fixture(autouse=True)
def serve_small_weights(monkeypatch):
    monkeypatch.setattr(cpu, "FEWEST_WEIGHTS", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [DENSE, Pattern(6, 8), Pattern(1, 32), Pattern(2, 4)])
@pytest.mark.parametrize(
    ("shape", "segments"),
    [
        ((1, 32), ()),
        ((37, 64), ()),
        ((37, 64), (30, 1, 6)),
        ((3, 10, 32), ()),
        ((3, 10, 32), (5, 5)),
        ((0, 32), ()),
    ],
)
def test_equals_the_reference(monkeypatch, shape, segments, pattern, dtype):
    monkeypatch.setattr(cpu, "CHUNK_WEIGHTS", 150)
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(*shape[:-1], 1)).to(dtype)
    weight[..., ::3] = 0.5  # ties
    ternary, scale = ternarize(weight, pattern, None, segments)
    expected, expected_scale = reference(weight, pattern, None, segments)
    assert ternary.dtype == torch.int8 and torch.equal(ternary, expected)
    assert torch.equal(scale, expected_scale)


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


def test_strided_weights_and_ablations(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_WEIGHTS", 150)
    weight = torch.randn(64, 40).t()
    for method in (None, Method(mask_source="quantized"), Method(order="mask-then-quant")):
        found = ternarize(weight, Pattern(6, 8), method)
        expected = reference(weight, Pattern(6, 8), method)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_pattern_that_does_not_divide():
    with pytest.raises(PatternError, match="in_features 12 is not a multiple of M = 8"):
        ternarize(torch.randn(4, 12), Pattern(6, 8))
