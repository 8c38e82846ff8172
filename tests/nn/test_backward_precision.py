"""Training with the backward products in fp8: close gradients, one graph, the same forward."""

import pytest
import torch
from torch import nn

from sparse_bitnet.core import ConfigError, Method
from sparse_bitnet.nn import convert

pytestmark = pytest.mark.usefixtures("threads")


def pair():
    models = []
    for backward in ("full", "fp8"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32))
        convert(model, "6:8", method=Method(backward=backward))
        models.append(model)
    return models[0], models[1]


def gradients(model, x):
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y, [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_forward_is_the_same_and_gradients_are_close():
    full, fp8 = pair()
    x = torch.randn(4, 16, 64)
    y, expected = gradients(full, x)
    same, ours = gradients(fp8, x)
    assert torch.equal(y, same)
    assert len(ours) == len(expected) == 5
    for mine, theirs in zip(ours, expected, strict=True):
        error = (mine - theirs).norm() / theirs.norm()
        # Two layers of e4m3, 2⁻⁵ an operand; the last bias sums dY itself.
        assert error < 0.1
    assert torch.equal(ours[-1], expected[-1])
    assert not torch.equal(ours[0], expected[0])


def test_compiles_without_a_break():
    _, model = pair()
    x = torch.randn(4, 16, 64)
    _, expected = gradients(model, x)
    model.zero_grad()
    model.compile(fullgraph=True, backend="aot_eager")
    _, ours = gradients(model, x)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_tiny_model_learns_alike(tiny, tokens):
    losses = {}
    for backward in ("full", "fp8"):
        model = tiny()
        convert(model, "6:8", method=Method(backward=backward))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[backward] = []
        for _ in range(12):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[backward].append(loss.item())
    assert losses["fp8"] == pytest.approx(losses["full"], abs=0.1)
    assert losses["fp8"][-1] < losses["fp8"][0] - 0.5


def test_other_words_are_refused():
    with pytest.raises(ConfigError, match=r"method.backward is 'e4m3'"):
        Method(backward="e4m3")
