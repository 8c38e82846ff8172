"""Groups, clipping, rates."""

import pytest
import torch

import tiny_models
from sparse_bitnet.nn import convert
from sparse_bitnet.train.config import OptimizerConfig
from sparse_bitnet.train.optim import build_optimizer, clip_gradients
from tiny_models import preset_model


def tiny(tied=True):
    model = preset_model(0, 32, tie_word_embeddings=tied)
    convert(model, "6:8")
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_are_decayed(tied):
    model = tiny(tied)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decayed, kept = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for name, p in model.named_parameters():
        is_matrix = name.endswith("proj.weight")
        assert (id(p) in decayed) == is_matrix, name
        assert (id(p) in kept) != is_matrix, name


def test_experts_are_decayed():
    model = tiny_models.tiny("qwen2_moe")
    convert(model, "6:8")
    optimizer = build_optimizer(model, OptimizerConfig())
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    experts = [p for p in model.parameters() if p.ndim == 3]
    assert experts
    assert all(id(p) in decayed for p in experts)


def test_steps_equal_those_of_plain_adamw():
    """State made beforehand changes nothing."""
    model, other = tiny(), tiny()
    other.load_state_dict(model.state_dict())
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, betas=(0.8, 0.9), epsilon=1e-6)
    ours = build_optimizer(model, config)
    plain = torch.optim.AdamW(
        other.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0
    )
    ids = torch.arange(16).view(2, 8)
    for _ in range(3):
        for each, optimizer in ((model, ours), (other, plain)):
            each(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        # A thousandth of one step: Adam divides small gradients by their own rounding errors.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_clipping():
    model = tiny()
    ids = torch.arange(16).view(2, 8)
    model(ids, labels=ids).loss.backward()
    parameters = list(model.parameters())
    before = [p.grad.clone() for p in parameters]
    expected = torch.cat([g.double().flatten() for g in before]).norm()
    norm = clip_gradients(parameters, 0.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected.item(), rel=1e-7)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
    assert clip_gradients(parameters, 0.1).item() == pytest.approx(expected.item(), rel=1e-7)
    for p, g in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.grad, g * (0.1 / expected).float(), rtol=1e-4, atol=1e-9)
    for _ in range(2):  # small: left alone
        assert clip_gradients(parameters, 1.0).item() == pytest.approx(0.1, rel=1e-4)
