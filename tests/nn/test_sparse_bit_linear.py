"""The layer against the method's formulas: exact integers forward, the dual estimator backward."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_bitnet.core import (
    DENSE,
    Method,
    Pattern,
    WeightError,
    nm_mask,
    quantize_activations,
    row_scale,
    ternarize,
)
from sparse_bitnet.nn import SparseBitLinear
from sparse_bitnet.nn.sparse_bit_linear import BitProduct

METHODS = [
    Method(order=order, mask_source=source, gradient=gradient, activation_bits=bits)
    for order, source, gradient, bits in itertools.product(
        ("quant-then-mask", "mask-then-quant"), ("master", "quantized"), ("dense", "masked"), (8, 4)
    )
    if not (order == "mask-then-quant" and source == "quantized")
]


def layer(out=6, inner=16, pattern="6:8", method=None, bias=True, shard_sizes=()):
    torch.manual_seed(0)
    linear = nn.Linear(inner, out, bias=bias)
    return SparseBitLinear(linear, Pattern.parse(pattern), method, shard_sizes)


def integers(x, module):
    """(Xq, x_scale, T, w_scale), everything in float64."""
    x_q, x_scale = quantize_activations(x, module.method.activation_bits)
    ternary, scale = ternarize(module.weight, module.pattern, module.method, module.shard_sizes)
    rows = row_scale(scale, module.shard_sizes, module.out_features)
    return x_q.double(), x_scale.double(), ternary.double(), rows.double()


class TestForward:
    @given(
        tokens=st.integers(1, 40),
        groups=st.integers(1, 5),
        out=st.integers(1, 40),
        bits=st.sampled_from([8, 4]),
        seed=st.integers(0, 99),
    )
    @settings(deadline=None, max_examples=60)
    def test_integer_product_is_exact(self, tokens, groups, out, bits, seed):
        """Any shape, odd ones too: the float32 result is that of exact integers, scaled once."""
        module = layer(out, groups * 8, method=Method(activation_bits=bits), bias=False)
        x = torch.randn(tokens, groups * 8, generator=torch.Generator().manual_seed(seed))
        x_q, x_scale = quantize_activations(x, bits)
        ternary, scale = ternarize(module.weight, module.pattern)
        product = x_q.long() @ ternary.long().t()
        expected = product.float() * x_scale * scale
        assert torch.equal(module(x), expected)

    @pytest.mark.parametrize("method", METHODS, ids=str)
    def test_formula_with_every_ablation(self, method):
        module = layer(method=method)
        x = torch.randn(2, 5, 16)
        x_q, x_scale, ternary, rows = integers(x, module)
        expected = (x_q @ ternary.t()) * x_scale * rows + module.bias.double()
        torch.testing.assert_close(module(x).double(), expected, rtol=1e-6, atol=1e-7)

    def test_fused_segments_equal_their_parts(self):
        """q, k and v fused, each with its own γ, compute what three layers do."""
        parts = [nn.Linear(16, rows) for rows in (4, 2, 2)]
        for scale, part in zip((1, 10, 0.1), parts, strict=True):
            part.weight.data.mul_(scale)
        fused = nn.Linear(16, 8)
        fused.weight.data = torch.cat([part.weight for part in parts]).detach()
        fused.bias.data = torch.cat([part.bias for part in parts]).detach()
        x = torch.randn(3, 16, requires_grad=True)
        one = SparseBitLinear(fused, Pattern(6, 8), shard_sizes=(4, 2, 2))
        several = [SparseBitLinear(part, Pattern(6, 8)) for part in parts]
        assert one.derived()[1].shape == (3,)
        y = torch.cat([module(x) for module in several], -1)
        assert torch.equal(one(x), y)
        wish = torch.randn_like(y)
        (dx,) = torch.autograd.grad((one(x) * wish).sum(), x)
        (same,) = torch.autograd.grad((y * wish).sum(), x)
        torch.testing.assert_close(dx, same)

    @pytest.mark.parametrize("shape", [(16,), (1, 16), (0, 16), (2, 0, 16), (2, 3, 4, 16)])
    def test_any_leading_dimensions(self, shape):
        module = layer()
        x = torch.randn(shape, requires_grad=True)
        y = module(x)
        assert y.shape == (*shape[:-1], 6)
        flat = module(x.detach().reshape(-1, 16)).reshape(y.shape)
        assert torch.equal(y, flat)
        y.sum().backward()
        assert x.grad is not None
        assert module.weight.grad is not None

    def test_views_without_contiguous_memory(self):
        module = layer()
        x = torch.randn(16, 5).t()
        assert torch.equal(module(x), module(x.contiguous()))
        wide = torch.randn(5, 32)[:, ::2]
        assert torch.equal(module(wide), module(wide.contiguous()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes_go_in_and_out(self, dtype):
        module = layer()
        x = torch.randn(5, 16).to(dtype).requires_grad_()
        y = module(x)
        assert y.dtype == dtype
        assert torch.equal(y, module(x.float()).to(dtype))
        y.sum().backward()
        assert x.grad.dtype == dtype
        assert module.weight.grad.dtype == torch.float32

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_stays_visible(self, bad):
        """So that a loss says NaN instead of a number made of clipped garbage."""
        x = torch.ones(2, 16)
        x[0, 3] = bad
        y = layer()(x)
        assert not torch.isfinite(y[0]).any()
        assert torch.isfinite(y[1]).all()

    def test_zero_weights_and_zero_inputs(self):
        module = layer()
        assert torch.equal(module(torch.zeros(2, 16)), module.bias.expand(2, 6))
        with torch.no_grad():
            module.weight.zero_()
        assert torch.equal(module(torch.randn(2, 16)), module.bias.expand(2, 6))


class TestBackward:
    """dX = dY @ (γT), dW = dYᵀ @ (Xq·x_scale), db = Σ dY; float64 throughout."""

    def gradients(self, module, x, dy):
        """Of BitProduct on float64 leaves, with the module's integers."""
        leaves = [t.detach().double().requires_grad_() for t in (x, module.weight, module.bias)]
        y = BitProduct.apply(
            *leaves,
            module.derived()[0],
            row_scale(module.derived()[1], module.shard_sizes, module.out_features),
            module.derived()[2],
            module.method.activation_bits,
            torch.float64,
        )
        dx, dw, db = torch.autograd.grad(y, leaves, dy)
        return dx, dw, db

    @pytest.mark.parametrize("method", METHODS, ids=str)
    @pytest.mark.parametrize("shard_sizes", [(), (4, 2)])
    def test_equals_the_formulas(self, method, shard_sizes):
        module = layer(method=method, shard_sizes=shard_sizes)
        x, dy = torch.randn(3, 5, 16), torch.randn(3, 5, 6, dtype=torch.float64)
        dx, dw, db = self.gradients(module, x, dy)
        x_q, x_scale, ternary, rows = integers(x, module)
        expected = torch.einsum("bto,bti->oi", dy, x_q * x_scale)
        if method.gradient == "masked":
            source = module.weight
            if method.mask_source == "quantized":
                source, _ = ternarize(module.weight, DENSE, shard_sizes=shard_sizes)
            expected = expected * nm_mask(source, Pattern(6, 8))
        torch.testing.assert_close(dx, dy @ (rows[:, None] * ternary), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dw, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(db, dy.sum((0, 1)), rtol=1e-12, atol=1e-12)

    def test_masked_weights_learn_unless_the_ablation_says_no(self):
        x = torch.randn(64, 16)
        for gradient in ("dense", "masked"):
            module = layer(method=Method(gradient=gradient), pattern="2:8")
            module(x).square().sum().backward()
            mask = nm_mask(module.weight, Pattern(2, 8))
            grad = module.weight.grad
            assert (grad[mask] != 0).all()
            assert bool((grad[~mask] != 0).all()) == (gradient == "dense")
            assert bool((grad[~mask] == 0).all()) == (gradient == "masked")

    @pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
    def test_asks_only_for_gradients_that_are_needed(self, frozen):
        module = layer()
        x = torch.randn(3, 16, requires_grad=True)
        tensors = {"x": x, "weight": module.weight, "bias": module.bias}
        tensors[frozen].requires_grad_(False)
        module(x).sum().backward()
        for name, tensor in tensors.items():
            assert (tensor.grad is None) == (name == frozen)

    def test_second_derivatives_are_refused(self):
        x = torch.randn(3, 16, requires_grad=True)
        (dx,) = torch.autograd.grad(layer()(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()

    def test_keeps_int8_for_backward(self):
        saved = []

        def pack(tensor):
            saved.append(tensor)
            return tensor

        module, x = layer(), torch.randn(50, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x)
        by_tokens = [t for t in saved if t.shape == x.shape]
        assert [t.dtype for t in by_tokens] == [torch.int8]


class TestModes:
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_same_output_whatever_is_recorded(self, context):
        module, x = layer(), torch.randn(3, 16)
        expected = module(x).detach()
        with context():
            assert torch.equal(module(x), expected)
        # Inference mode leaves nothing behind that training cannot use.
        module(x.requires_grad_()).sum().backward()

    def test_autocast(self):
        module = layer()
        x = torch.randn(3, 16, requires_grad=True)
        exact = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
            half = module(x.bfloat16())
        assert y.dtype == half.dtype == torch.bfloat16
        # Quantized from float32 and rounded once at the end, not before.
        assert torch.equal(y, exact.bfloat16())
        y.float().square().sum().backward()
        assert (x.grad.dtype, module.weight.grad.dtype) == (torch.float32, torch.float32)
        (dw,) = torch.autograd.grad(exact.square().sum(), module.weight)
        assert (module.weight.grad - dw).norm() < 0.02 * dw.norm()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_activation_checkpointing(self, reentrant):
        module = nn.Sequential(layer(16, 16), nn.GELU(), layer(16, 16))
        x = torch.randn(3, 16, requires_grad=True)
        expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
        y = checkpoint(module, x, use_reentrant=reentrant)
        y.square().sum().backward()
        got = [x.grad, *(p.grad for p in module.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_the_result_may_be_changed_in_place(self):
        """Llama 4 scales its queries so; autograd refuses it of a function that returns a view."""
        module, x = layer(), torch.randn(2, 3, 16)
        (module(x) * 2).sum().backward()
        expected = module.weight.grad
        module.weight.grad = None
        module(x).mul_(2).sum().backward()
        assert torch.equal(module.weight.grad, expected)


class TestRefusals:
    def test_segments_that_do_not_cut_the_rows(self):
        with pytest.raises(WeightError, match=r"shard sizes \(4, 3\) must be positive and sum"):
            layer(shard_sizes=(4, 3))


def test_looks_like_a_linear_layer():
    module = layer()
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (16, 6)
    assert "in_features=16, out_features=6, bias=True, pattern=6:8" in repr(module)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
