import pytest
import torch

from sparse_bitnet.core import quantize_int8
from sparse_bitnet.kernels.quantize_activations import reference, triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 7, 64, 896, 1025, 4099])
@pytest.mark.parametrize("tokens", [1, 5])
def test_equals_reference(tokens, columns, dtype):
    x = (torch.randn(tokens, columns) * torch.rand(tokens, 1).mul(8).exp()).to(dtype)
    x[0, 0] = 0
    quantized, scale = triton.quantize(x)
    expected, step = quantize_int8(x)
    assert torch.equal(quantized, expected)
    assert torch.equal(scale, step)


def test_rounds_half_to_even():
    # With a magnitude of 127 the factor is 1, so halves stay halves.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    quantized, scale = triton.quantize(x)
    assert quantized.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert scale.item() == 1.0


def test_no_token_and_no_feature():
    for shape in ((0, 64), (2, 0, 64)):
        quantized, scale = triton.quantize(torch.empty(shape))
        assert quantized.shape == shape
        assert scale.shape == (*shape[:-1], 1)


def test_leading_dimensions_and_strides():
    x = torch.randn(2, 3, 24)
    for view in (x, x.transpose(0, 1), x[..., ::2], x[:, 1:, 8:20], x.permute(2, 1, 0)):
        quantized, scale = triton.quantize(view)
        expected, step = quantize_int8(view)
        assert torch.equal(quantized, expected)
        assert torch.equal(scale, step)


def test_tiny_tokens_use_the_smallest_magnitude():
    x = torch.tensor([[0.0, 0.0], [1e-9, -1e-7], [1e-5, 0.0]])
    quantized, scale = triton.quantize(x)
    expected, step = quantize_int8(x)
    assert torch.equal(quantized, expected)
    assert torch.equal(scale, step)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_nan_reaches_the_scale():
    x = torch.randn(3, 100)
    x[1, 70] = torch.nan
    x[2, 3] = -torch.inf
    _, scale = triton.quantize(x)
    assert scale[0].isfinite()
    assert scale[1].isnan()
    assert scale[2].isinf()


@pytest.mark.parametrize("columns", [64, 1160])
def test_fuses_the_norm(columns):
    x = torch.randn(4, columns).half()
    weight = torch.rand(columns).half()
    quantized, scale = triton.quantize(x, weight, 1e-6)
    expected, step = reference.quantize_fused(x, weight, 1e-6)
    # Another order of the sum of squares may move a value across a rounding boundary of fp16.
    torch.testing.assert_close(scale, step, rtol=1e-3, atol=0)
    assert (quantized.int() - expected.int()).abs().max() <= 1
    assert (quantized != expected).float().mean() < 0.01


def test_strided_weight_of_the_norm():
    x, weight = torch.randn(3, 40), torch.rand(80)[::2]
    quantized, scale = triton.quantize(x, weight, 1e-6)
    expected, step = reference.quantize_fused(x, weight, 1e-6)
    torch.testing.assert_close(scale, step, rtol=1e-6, atol=0)
    assert (quantized.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (3, 1160), (40, 200), (2, 9000)])
def test_adds_before_the_norm(rows, columns):
    x, delta = torch.randn(2, rows, columns).half()
    weight = torch.rand(columns).half()
    total = torch.full_like(x, torch.nan)
    quantized, scale = triton.quantize(x, weight, 1e-6, delta=delta, total=total)
    assert torch.equal(total, x + delta)
    expected, step = reference.quantize_fused(total, weight, 1e-6)
    torch.testing.assert_close(scale, step, rtol=1e-3, atol=0)
    assert (quantized.int() - expected.int()).abs().max() <= 1
    assert (quantized != expected).float().mean() < 0.01


def test_fuses_the_swiglu_product():
    x = torch.randn(4, 2 * 232)
    quantized, scale = triton.quantize(x, swiglu=True)
    expected, step = reference.quantize_fused(x, swiglu=True)
    torch.testing.assert_close(scale, step, rtol=1e-6, atol=0)
    assert (quantized.int() - expected.int()).abs().max() <= 1
    assert (quantized != expected).float().mean() < 0.01
