"""int8 and int4 activations against loops in Python."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import ConfigError, quantize_activations, quantize_int4, quantize_int8


def clip(value, low, high):
    return max(low, min(high, round(value)))


@given(data=st.data(), tokens=st.integers(1, 3), features=st.integers(1, 9))
@settings(deadline=None, max_examples=100)
def test_int8_equals_the_loop(slow, data, tokens, features):
    x = data.draw(slow.tensors(tokens, features))
    quantized, scale = quantize_int8(x)
    assert (quantized.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (tokens, 1))
    for (token,), row in slow.rows_of(x):
        largest = max(np.float32(max(abs(v) for v in row)), np.float32(1e-5))
        s = np.float32(127) / largest
        assert quantized[token].tolist() == [clip(np.float32(v) * s, -127, 127) for v in row]
        assert scale[token].item() == largest / np.float32(127)


@given(data=st.data(), tokens=st.integers(1, 3), features=st.integers(1, 9))
@settings(deadline=None, max_examples=100)
def test_int4_equals_the_loop(slow, data, tokens, features):
    x = data.draw(slow.tensors(tokens, features))
    quantized, scale = quantize_int4(x)
    for (token,), row in slow.rows_of(x):
        mean = max(math.fsum(abs(v) for v in row) / features, 1e-5)
        one = scale[token].item()
        assert one == pytest.approx(mean / math.sqrt(7), rel=1e-6)
        for value, got in zip(row, quantized[token].tolist(), strict=True):
            exact = value * (math.sqrt(7) / mean)
            # At the edge between two integers float32 may take either.
            near_edge = abs(abs(exact) % 1 - 0.5) < 1e-4
            assert abs(got - clip(exact, -8, 7)) <= (1 if near_edge else 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_of_zeros_stays_zero(bits):
    quantized, scale = quantize_activations(torch.tensor([[0.0, -0.0], [1.0, 2.0]]), bits)
    assert quantized[0].tolist() == [0, 0]
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_compute_in_float32(bits, dtype):
    x = torch.randn(2, 3, 16).to(dtype)
    quantized, scale = quantize_activations(x, bits)
    expected = quantize_activations(x.float(), bits)
    assert torch.equal(quantized, expected[0])
    assert torch.equal(scale, expected[1])


def test_int8_error_is_at_most_half_a_step():
    x = torch.randn(64, 256)
    quantized, scale = quantize_int8(x)
    assert ((quantized * scale - x).abs() <= scale * 0.50001).all()
    assert (quantized.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_huge_values_do_not_overflow(bits):
    quantized, scale = quantize_activations(torch.full((2, 64), 3e38), bits)
    assert torch.isfinite(scale).all()
    assert (quantized == (127 if bits == 8 else 3)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_scale(bits, bad):
    """Integers cannot say NaN, so the scale must: the token's output is then not finite either."""
    x = torch.ones(2, 8)
    x[0, 3] = bad
    _, scale = quantize_activations(x, bits)
    assert not torch.isfinite(scale[0])
    assert torch.isfinite(scale[1])


def test_no_tokens():
    quantized, scale = quantize_int8(torch.empty(0, 8))
    assert quantized.shape == (0, 8)
    assert scale.shape == (0, 1)


def test_views_without_contiguous_memory():
    x = torch.randn(16, 6).t()
    assert torch.equal(quantize_int8(x)[0], quantize_int8(x.contiguous())[0])


def test_refuses_other_bits():
    with pytest.raises(ConfigError, match="bits is 5; choose 8 or 4"):
        quantize_activations(torch.ones(2, 8), 5)


@pytest.mark.parametrize("exponent", range(-150, 128, 3))
def test_int8_never_leaves_its_range(exponent):
    """The largest magnitude of a token becomes ±127 whatever its mantissa: nothing to clip."""
    mantissa = torch.rand(4096, 1, generator=torch.Generator().manual_seed(exponent)) + 1
    x = torch.cat([mantissa, -mantissa], dim=-1) * 2.0**exponent
    quantized, _ = quantize_int8(x)
    if exponent > -16:  # below 1e-5 the smallest magnitude takes over
        assert (quantized[:, 0] == 127).all()
    assert torch.equal(quantized[:, 0].int(), -quantized[:, 1].int())
