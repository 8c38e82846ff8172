"""The backward products: the plain ones by their formulas, the fp8 ones by what may round."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import quantize_int8
from sparse_bitnet.kernels.backward import fp8, gradients, reference

E4M3_ROUNDING = 2.0**-4  # half the spacing of three mantissa bits, relative to the value


def operands(tokens=48, out=32, inner=64):
    torch.manual_seed(0)
    dy = torch.randn(tokens, out) * torch.rand(tokens, 1).exp2() * 1e-4
    x_q, x_scale = quantize_int8(torch.randn(tokens, inner) * (1 + torch.rand(tokens, 1)))
    ternary = torch.randint(-1, 2, (out, inner), dtype=torch.int8)
    return dy, x_q, x_scale, ternary


def formulas(dy, x_q, x_scale, ternary, w_scale):
    """In float64."""
    rows, x = dy.double().flatten(0, -2), (x_q * x_scale.double()).flatten(0, -2)
    dx = dy.double() @ (w_scale.double().unsqueeze(-1) * ternary)
    return dx, rows.t() @ x


def relative(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("one_scale", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_plain(dtype, tolerance, one_scale):
    dy, x_q, x_scale, ternary = operands()
    w_scale = torch.full((32,), 0.02) if one_scale else torch.rand(32) + 0.01
    dy = (dy * 1e4).to(dtype)
    weight_dtype = dtype if dtype == torch.float64 else torch.float32
    dx, dw = gradients(
        dy, x_q, x_scale, ternary, w_scale, one_scale=one_scale, weight_dtype=weight_dtype
    )
    expected = formulas(dy, x_q, x_scale, ternary, w_scale)
    assert (dx.dtype, dw.dtype) == (dtype, weight_dtype)
    assert relative(dx, expected[0]) < tolerance
    assert relative(dw, expected[1]) < tolerance


def test_float16_sums_do_not_overflow_without_their_scale():
    dy = torch.full((1, 64), 2000.0, dtype=torch.float16)
    ternary = torch.ones(64, 16, dtype=torch.int8)
    dx = reference.input_gradient(dy, ternary, torch.full((64,), 0.01), one_scale=True)
    assert dx.float() == pytest.approx(1280.0, rel=1e-2)


@pytest.mark.parametrize("one_scale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_rounds_each_operand_once(dtype, one_scale):
    """Each operand's relative error is uniform over e4m3's spacing: about 2⁻⁴/√3 · 0.7."""
    dy, x_q, x_scale, ternary = operands()
    w_scale = torch.full((32,), 0.02) if one_scale else torch.rand(32) + 0.01
    dy = (dy * 1e3).to(dtype)
    dx, dw = gradients(dy, x_q, x_scale, ternary, w_scale, one_scale=one_scale, use_fp8=True)
    expected = formulas(dy, x_q, x_scale, ternary, w_scale)
    assert 0.01 < relative(dx, expected[0]) < 0.6 * E4M3_ROUNDING
    assert 0.01 < relative(dw, expected[1]) < 0.9 * E4M3_ROUNDING
    assert dw.dtype == torch.float32


@pytest.mark.parametrize("one_scale", [True, False])
def test_fp8_rounds_the_same_at_every_magnitude(one_scale):
    """Powers of two move through all scales; nothing falls below e4m3's smallest number."""
    dy, x_q, x_scale, ternary = operands()
    w_scale = torch.full((32,), 0.02) if one_scale else torch.rand(32) + 0.01

    def both(dy, x_scale):
        dx, dw = gradients(dy, x_q, x_scale, ternary, w_scale, one_scale=one_scale, use_fp8=True)
        return dx, dw

    dx, dw = both(dy, x_scale)
    small, tiny = 2.0**-20, 2.0**-12
    scaled = both(dy * small, x_scale * tiny)
    assert torch.equal(scaled[0], dx * small)
    assert torch.equal(scaled[1], dw * (small * tiny))


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_fp8_is_exact_where_nothing_rounds(seed):
    """Few bits, and scales that are powers of two over a wide range of tokens."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    dy = integers(-15, 16, 16, 32).float() * torch.exp2(integers(-4, 5, 16, 1).float())
    x_q = integers(-15, 16, 16, 16).to(torch.int8)
    x_scale = torch.exp2(integers(-3, 3, 16, 1).float())
    ternary = integers(-1, 2, 32, 16).to(torch.int8)
    w_scale = torch.full((32,), 0.25)
    dx, dw = gradients(dy, x_q, x_scale, ternary, w_scale, one_scale=True, use_fp8=True)
    expected = formulas(dy, x_q, x_scale, ternary, w_scale)
    assert torch.equal(dx.double(), expected[0])
    assert torch.equal(dw.double(), expected[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fp8_shows_what_is_not_finite(bad):
    dy, x_q, x_scale, ternary = operands()
    dy[3, 5] = bad
    dx, dw = gradients(
        dy, x_q, x_scale, ternary, torch.full((32,), 0.02), one_scale=True, use_fp8=True
    )
    assert not torch.isfinite(dx[3]).any()
    assert torch.isfinite(dx[[0, 1, 2, 4]]).all()
    assert not torch.isfinite(dw).all()


def test_fp8_of_zero_and_of_tiny_gradients():
    dy, x_q, x_scale, ternary = operands()
    w_scale = torch.full((32,), 0.02)
    for factor in (0.0, 1e-30, 1e-37):
        dx, dw = gradients(
            dy * factor, x_q, x_scale, ternary, w_scale, one_scale=True, use_fp8=True
        )
        assert torch.isfinite(dx).all()
        assert torch.isfinite(dw).all()


@pytest.mark.parametrize("shape", [(0, 32, 64), (47, 32, 64), (48, 33, 64), (48, 32, 40)])
def test_sizes_that_fp8_does_not_serve_take_the_plain_products(shape):
    assert not fp8.serves(*shape)
    dy, x_q, x_scale, ternary = operands(*shape)
    w_scale = torch.rand(shape[1])
    ours = gradients(dy, x_q, x_scale, ternary, w_scale, use_fp8=True)
    plain = gradients(dy, x_q, x_scale, ternary, w_scale)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_float64_gradients_are_never_rounded_to_fp8():
    dy, x_q, x_scale, ternary = operands()
    w_scale = torch.rand(32)
    dx, _ = gradients(dy.double(), x_q, x_scale, ternary, w_scale, use_fp8=True)
    expected, _ = formulas(dy.double(), x_q, x_scale, ternary, w_scale)
    torch.testing.assert_close(dx, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_fp8", [False, True])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed_with_leading_dimensions(needs, use_fp8):
    dy, x_q, x_scale, ternary = operands()
    shaped = [tensor.unflatten(0, (3, 16)) for tensor in (dy, x_q, x_scale)]
    dx, dw = gradients(*shaped, ternary, torch.rand(32), use_fp8=use_fp8, needs=needs)
    assert ((dx is not None), (dw is not None)) == needs
    assert dx is None or dx.shape == (3, 16, 64)


def test_every_e4m3_number_turns_and_scales():
    codes = torch.arange(256, dtype=torch.uint8).view(reference.FP8).reshape(16, 16)
    turned = reference.fp8_transposed(codes, None)
    assert torch.equal(turned.view(torch.uint8), codes.t().contiguous().view(torch.uint8))
    halves = reference.fp8_transposed(codes, torch.full((16,), 0.5)).float()
    finite = torch.isfinite(codes.float().t())
    expected = codes.float().t() / 2
    normal = finite & (expected.abs() >= 2.0**-6)
    assert torch.equal(halves[normal], expected[normal])
