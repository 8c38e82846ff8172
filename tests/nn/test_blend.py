"""λ: full precision at 0, the published method at 1, the dual straight-through gradient between."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from sparse_bitnet.core import (
    ConfigError,
    Method,
    Pattern,
    method_mask,
    quantize_activations,
    row_scale,
    ternarize,
)
from sparse_bitnet.nn import SparseBitLinear, SparseLinear, convert, frozen, set_quantization


def layer(pattern, method=None, **more):
    torch.manual_seed(0)
    return SparseBitLinear(nn.Linear(16, 6), Pattern.parse(pattern), method, **more)


def straight_through(module, x, part):
    """The definition in float64, by autograd: v + (what is computed with − v).detach()."""
    method, weight = module.method, module.weight.double()
    ternary, scale = ternarize(module.weight, module.pattern, method, module.shard_sizes)
    rows = row_scale(scale, module.shard_sizes, module.out_features).double()
    mask = method_mask(module.weight, module.pattern, method, module.shard_sizes)
    mask = torch.ones_like(ternary, dtype=torch.bool) if mask is None else mask
    x_q, x_scale = quantize_activations(x, method.activation_bits)
    masked = weight * mask
    w_value = masked + part * (rows[:, None] * ternary - masked)
    x_value = x + part * (x_q.double() * x_scale.double() - x)
    carries = masked if method.gradient == "masked" else weight
    w = carries + (w_value - carries).detach()
    return (x + (x_value - x).detach()) @ w.T + module.bias.double()


@settings(deadline=None, max_examples=40)
@given(
    part=st.floats(0, 1, exclude_max=True, width=32),
    pattern=st.sampled_from(["dense", "6:8", "2:4"]),
    gradient=st.sampled_from(["dense", "masked"]),
    order=st.sampled_from(["quant-then-mask", "mask-then-quant"]),
    bits=st.sampled_from([8, 4]),
    shard_sizes=st.sampled_from([(), (4, 2)]),
)
def test_value_and_gradients(part, pattern, gradient, order, bits, shard_sizes):
    method = Method(gradient=gradient, order=order, activation_bits=bits)
    module = layer(pattern, method, shard_sizes=shard_sizes)
    set_quantization(module, part)
    x, dy = torch.randn(2, 5, 16), torch.randn(2, 5, 6)
    leaves = [x.requires_grad_(), module.weight, module.bias]
    y = module(x)
    got = torch.autograd.grad(y, leaves, dy)
    double = x.detach().double().requires_grad_()
    expected = straight_through(module, double, part)
    gradients = torch.autograd.grad(expected, [double, module.weight, module.bias], dy.double())
    # float32 sums of 16 products here, exact ones there.
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["dense", "6:8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_at_zero_it_is_the_baseline(pattern, autocast):
    ours = layer(pattern)
    theirs = SparseLinear(copy.deepcopy(ours), Pattern.parse(pattern))
    set_quantization(ours, 0)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2_moe"])
def test_at_one_every_bit_is_the_published_methods(tiny, tokens, architecture):
    never, back = tiny(architecture), tiny(architecture)
    for model in (never, back):
        convert(model, "6:8")
    set_quantization(back, 0.3)
    assert not torch.equal(back(tokens).logits, never(tokens).logits)
    set_quantization(back, 1)
    expected, got = never(tokens, labels=tokens), back(tokens, labels=tokens)
    assert torch.equal(got.logits, expected.logits)
    for one in (expected, got):
        one.loss.backward()
    for ours, theirs in zip(back.parameters(), never.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2_moe"])
def test_at_zero_a_converted_model_is_the_dense_one(tiny, tokens, architecture):
    model = tiny(architecture)
    model.eval()
    expected = model(tokens).logits
    convert(model, "dense")
    set_quantization(model, 0)
    # Experts are multiplied one by one here, and grouped in transformers: another order of sums.
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-6)


def test_the_baseline_has_no_such_dial(tiny, tokens):
    model = tiny()
    convert(model, "6:8", kind="bf16")
    before = model(tokens).logits
    set_quantization(model, 0.5)
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("part", [-0.1, 1.1, float("nan")])
def test_outside_of_zero_and_one(part):
    with pytest.raises(ConfigError, match="is not between 0 and 1"):
        set_quantization(layer("6:8"), part)


def test_by_rule(tiny, tokens):
    """Each layer computes at its rule's λ: as if it alone had been set to it."""
    model, apart = tiny(), tiny()
    for one in (model, apart):
        convert(one, "6:8")
    set_quantization(model, 0.5)  # all of them share a λ before they part
    for parts in ({"q_proj": 0.25, "proj": 0.75}, {"q_proj": 0.5, "proj": 1.0}):
        set_quantization(model, 0.0, parts)
        for name, module in apart.named_modules():
            if isinstance(module, SparseBitLinear):
                set_quantization(module, parts["q_proj" if "q_proj" in name else "proj"])
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, apart(tokens).logits)
    set_quantization(model, 1.0)
    assert not any(
        module.blend is not None for module in model.modules() if hasattr(module, "blend")
    )
    with pytest.raises(ConfigError, match="the rule 'nowhere' decides for no ternary module"):
        set_quantization(model, 0.5, {"nowhere": 0.5})


def test_frozen_copies_moves_and_state_dicts(tiny, tokens):
    model = tiny()
    convert(model, "6:8")
    keys = list(model.state_dict())
    set_quantization(model, 0.4)
    assert list(model.state_dict()) == keys
    expected = model(tokens).logits
    with frozen(model):
        assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    half = copy.deepcopy(model).double()
    set_quantization(model, 0.6)
    assert not torch.equal(model(tokens).logits, expected)
    # The copy kept its own λ. γ comes from float32 weights in both.
    torch.testing.assert_close(half(tokens).logits.float(), expected, rtol=1e-3, atol=1e-3)


def test_activation_checkpointing():
    module, x = layer("6:8"), torch.randn(3, 16, requires_grad=True)
    set_quantization(module, 0.5)
    expected = torch.autograd.grad(module(x).square().sum(), [x, module.weight])
    y = checkpoint(module, x, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), [x, module.weight])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("threads", "fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_compiled_once_for_all_values(tiny, tokens):
    eager, model = tiny(num_hidden_layers=1), tiny(num_hidden_layers=1)
    for each in (eager, model):
        convert(each, "6:8")
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    graphs = []
    for part in (0.1, 0.2, 0.7, 1.0, 1.0):
        for each in (eager, model):
            set_quantization(each, part)
            each.zero_grad()
            each(tokens, labels=tokens).loss.backward()
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    first = graphs[0]
    assert graphs == [first, first, first, 2 * first, 2 * first]
