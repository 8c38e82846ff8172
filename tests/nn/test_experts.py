"""Mixture-of-experts weights: each expert is the linear layers it would be on its own."""

import pytest
import torch
from torch import nn

from sparse_bitnet.core import Method, Pattern, nm_mask
from sparse_bitnet.nn import SparseBitExperts, SparseBitLinear, SparseExperts, SparseLinear
from sparse_bitnet.nn.experts import route, why_not_experts
from tiny_models import Experts

EXPERTS, HIDDEN, INNER, TOKENS = 4, 16, 8, 20


def routing():
    """Hidden states and two of the first three experts for each token: the fourth gets none."""
    hidden = torch.randn(TOKENS, HIDDEN)
    index = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(TOKENS)])
    return hidden, index, torch.rand(TOKENS, 2)


def one_by_one(experts, kind, hidden, index, weights, **options):
    """Every token through three separate layers of each of its experts."""

    def linear(weight):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight.data = weight.detach().clone()
        module = kind(plain, **options)
        return module

    result = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for place, expert in enumerate(index[token].tolist()):
            gate = linear(experts.gate_up_proj[expert, :INNER])(hidden[token])
            up = linear(experts.gate_up_proj[expert, INNER:])(hidden[token])
            down = linear(experts.down_proj[expert])(nn.functional.silu(gate) * up)
            result[token] += weights[token, place] * down
    return result


@pytest.mark.parametrize("pattern", ["dense", "6:8", "2:4"])
@pytest.mark.parametrize(
    ("kind", "linear", "bits"),
    [
        (SparseBitExperts, SparseBitLinear, 8),
        (SparseBitExperts, SparseBitLinear, 4),
        (SparseExperts, SparseLinear, 8),
    ],
)
def test_experts_equal_separate_layers(kind, linear, pattern, bits):
    experts, inputs = Experts(), routing()
    options = {"pattern": Pattern.parse(pattern), "method": Method(activation_bits=bits)}
    module = kind(experts, **options)
    expected = one_by_one(experts, linear, *inputs, **options)
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-4, atol=1e-4)
    if kind is SparseBitExperts:  # gate and up are matrices of their own
        assert module.derived("gate_up_proj")[1].shape == (EXPERTS, 2)
        assert module.derived("down_proj")[1].shape == (EXPERTS, 1)


@pytest.mark.parametrize("kind", [SparseBitExperts, SparseExperts])
@pytest.mark.parametrize("gradient", ["dense", "masked"])
def test_gradients(kind, gradient):
    """Chosen experts learn, masked weights too unless the ablation says no; others get zero."""
    module = kind(Experts(), Pattern(2, 8), Method(gradient=gradient))
    hidden, index, weights = routing()
    hidden.requires_grad_()
    module(hidden, index, weights).square().sum().backward()
    assert hidden.grad is not None
    for parameter in module.master_parameters().values():
        mask = nm_mask(parameter, Pattern(2, 8))
        grad = parameter.grad
        assert (grad[-1] == 0).all()
        for expert in range(EXPERTS - 1):
            lost = grad[expert][~mask[expert]]
            assert (lost == 0).all() if gradient == "masked" else (lost != 0).float().mean() > 0.9


def test_an_index_beyond_the_last_expert_is_no_expert():
    """What transformers' expert parallelism writes for tokens of another rank."""
    hidden, index, weights = routing()
    module = SparseBitExperts(Experts(), Pattern(6, 8))
    index[3] = EXPERTS
    assert torch.equal(module(hidden, index, weights)[3], torch.zeros(HIDDEN))


def test_route_weighs_and_sums():
    hidden = torch.tensor([[1.0], [10.0]])
    index = torch.tensor([[0, 1], [1, 0]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    result = route(hidden, index, weights, 2, lambda expert, x: x * (expert + 1))
    assert result.tolist() == [[0.5 * 1 + 0.25 * 2], [1.0 * 20 + 0.0]]


@pytest.mark.parametrize("kind", [SparseBitExperts, SparseExperts])
def test_half_precision(kind):
    module = kind(Experts(), Pattern(6, 8))
    hidden, index, weights = routing()
    full = module(hidden, index, weights)
    half = module(hidden.bfloat16(), index, weights.bfloat16())
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        auto = module(hidden, index, weights)
    for other in (half, auto):
        assert (other.float() - full).norm() < 0.05 * full.norm()


class TestWhyNot:
    def test_takes_what_it_knows(self):
        assert why_not_experts(Experts()) is None

    def test_other_parameters(self):
        module = Experts()
        module.down_proj_bias = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))
        assert "not gate_up_proj and down_proj alone" in str(why_not_experts(module))
        assert "are ['weight']" in str(why_not_experts(nn.Conv1d(2, 2, 2, bias=False)))

    def test_other_layouts(self):
        turned = Experts()
        turned.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, 4 * INNER))
        wrong = str(why_not_experts(turned))
        assert "gate_up_proj (4, 16, 32) and down_proj (4, 16, 8) are not [E, 2I, H]" in wrong
        flat = Experts()
        flat.down_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))
        assert "three dimensions" in str(why_not_experts(flat))

    def test_other_arithmetic(self):
        class Clamped(Experts):
            def _apply_gate(self, gate_up):
                return gate_up.clamp(max=7)

        assert "gate is not act_fn(gate) * up" in str(why_not_experts(Clamped()))
        interleaved, normed, bare = Experts(), Experts(), Experts()
        interleaved.is_concatenated = False
        normed.has_post_expert_norm = True
        del bare.act_fn
        assert "interleaves" in str(why_not_experts(interleaved))
        assert "normalizes" in str(why_not_experts(normed))
        assert "no act_fn" in str(why_not_experts(bare))
