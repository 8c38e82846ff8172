"""The chunked loss against its definition over full logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from sparse_bitnet.data.loader import IGNORED, Batch
from sparse_bitnet.train import loss as loss_module
from sparse_bitnet.train.config import TeacherConfig
from sparse_bitnet.train.loss import (
    CausalLoss,
    Targets,
    chunked_loss,
)
from sparse_bitnet.train.presets import preset_config
from tiny_models import tiny


def definition(student, labels, divisor, teacher=None, how=None):
    """Over the logits of all tokens: the loss, and its parts, cross-entropy and T²·KL."""
    kept = labels != IGNORED
    entropy = F.cross_entropy(student[kept], labels[kept], reduction="sum") / divisor
    if teacher is None or how is None:
        return entropy, entropy.detach().view(1)
    t = how.temperature
    log_p, log_q = ((logits[kept] / t).log_softmax(-1) for logits in (teacher, student))
    divergence = t**2 * (log_p.exp() * (log_p - log_q)).sum() / divisor
    loss = how.cross_entropy * entropy + how.weight * divergence
    return loss, torch.stack([entropy, divergence]).detach()


@settings(deadline=None, max_examples=80)
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 11),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    ignored=st.sampled_from([0.0, 0.6, 1.0]),
    divisor=st.sampled_from([None, 7.0]),
    weights=st.none()
    | st.tuples(
        st.sampled_from([0.0, 1.0, 2.5]),
        st.sampled_from([0.0, 1.0, 0.3]),
        st.sampled_from([0.5, 1.0, 5.0]),
    ),
    heads=st.tuples(st.booleans(), st.booleans()),
)
def test_value_and_gradients_in_float64(
    tokens, vocabulary, chunk, seed, scale, ignored, divisor, weights, heads
):
    """Student and teacher with or without a head, of other widths; labels of some tokens only."""
    torch.manual_seed(seed)

    def last(has_head, width):
        hidden = torch.randn(1, tokens, width if has_head else vocabulary, dtype=torch.float64)
        head = torch.randn(vocabulary, width, dtype=torch.float64) if has_head else None
        return hidden, head

    def logits(hidden, head):
        return (hidden if head is None else hidden @ head.T).flatten(0, -2)

    hidden, head = last(heads[0], 5)
    theirs, their_head = last(heads[1], 3)
    hidden *= scale
    labels = torch.randint(vocabulary, (1, tokens))
    labels.masked_fill_(torch.rand(1, tokens) < ignored, IGNORED)
    how = None if weights is None else TeacherConfig("teacher", *weights)
    targets = None if how is None else Targets(theirs, their_head, how)
    leaves = [hidden.requires_grad_(), *([] if head is None else [head.requires_grad_()])]
    given_divisor = None if divisor is None else torch.tensor(divisor)
    loss, parts = chunked_loss(hidden, head, labels, chunk, targets, given_divisor)
    got = torch.autograd.grad(3.0 * loss, leaves)
    assert not parts.requires_grad
    teacher = None if how is None else logits(theirs, their_head)
    exact = definition(logits(hidden, head), labels.flatten(), divisor or tokens, teacher, how)
    expected = torch.autograd.grad(3.0 * exact[0], leaves)
    torch.testing.assert_close((loss, parts), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 7, 16384, 20480, 16385, 98304])
def test_chunks_are_equal_where_they_can_be(tokens, monkeypatch):
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 2**29)
    chunk = loss_module._chunk(tokens, 151936, "cpu")
    assert 1 <= chunk * 151936 <= 2**29
    assert 2 * chunk * 151936 > min(2**29, tokens * 151936)
    assert tokens % chunk == 0 or tokens == 16385


@pytest.mark.parametrize("how", [None, TeacherConfig("teacher", 2.0, 0.5, 3.0)])
def test_the_form_for_fusion_is_the_same(how):
    """The derivatives of tokens without a label count nowhere, and are none of either's."""
    logits, labels = torch.randn(7, 11, dtype=torch.bfloat16), torch.randint(11, (7,))
    labels[2] = IGNORED
    teacher = None if how is None else torch.randn(7, 11, dtype=torch.bfloat16)
    sums, slope = loss_module._loss_and_slope_for_fusion(logits.clone(), labels, teacher, how)
    same, expected = loss_module._loss_and_slope(logits.clone(), labels, teacher, how)
    torch.testing.assert_close(sums, same)
    torch.testing.assert_close(slope[labels != IGNORED], expected[labels != IGNORED])


def test_only_what_is_asked_for_gets_a_gradient():
    hidden, head = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3])
    chunked_loss(hidden, head, labels)[0].backward()
    assert head.grad is not None
    hidden.requires_grad_()
    head.requires_grad_(False)
    chunked_loss(hidden, head, labels)[0].backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not chunked_loss(hidden, head, labels)[0].requires_grad


def test_autocast_multiplies_in_bf16_and_sums_in_float32():
    torch.manual_seed(0)
    hidden = torch.randn(64, 32, requires_grad=True)
    head = torch.randn(100, 32, requires_grad=True)
    labels = torch.randint(100, (64,))
    exact, _ = definition(hidden @ head.T, labels, 64)
    expected = torch.autograd.grad(exact, (hidden, head))
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_loss(hidden, head, labels, 10)[0]
    assert loss.dtype == torch.float32
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, head)), expected, strict=True):
        assert ours.dtype == torch.float32
        # bf16 keeps eight bits: two roundings of a factor and one of the product.
        assert (ours - theirs).norm() / theirs.norm() < 2e-2


class _Largest(TorchDispatchMode):
    """The most elements that any result had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("taught", [False, True])
def test_full_logits_are_never_there(taught):
    tokens, vocabulary, chunk = 256, 1000, 8
    hidden = torch.randn(tokens, 4, requires_grad=True)
    head = torch.randn(vocabulary, 4, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    teacher = Targets(torch.randn(tokens, 6), torch.randn(vocabulary, 6), TeacherConfig())
    with _Largest() as largest:
        chunked_loss(hidden, head, labels, chunk, teacher if taught else None)[0].backward()
    assert largest.elements == chunk * vocabulary


@pytest.mark.parametrize(
    ("taught", "chunk"),
    [
        (False, 5),  # six would fit, but two parts of five are equal
        (True, 2),  # three would fit, but five parts of two are equal
    ],
)
def test_default_chunk_follows_the_vocabularies(monkeypatch, taught, chunk):
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 2**20)
    hidden, head = torch.randn(10, 2, requires_grad=True), torch.randn(151_936, 2)
    teacher = Targets(torch.randn(10, 2), head, TeacherConfig()) if taught else None
    with _Largest() as largest:
        chunked_loss(hidden, head, torch.zeros(10, dtype=torch.int64), targets=teacher)
    assert largest.elements == chunk * 151_936


@pytest.mark.parametrize("tied", [True, False])
def test_model_loss_equals_that_of_transformers(tied):
    shape = preset_config("tiny", 50)
    shape.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(shape)
    loss_of = CausalLoss(model)
    assert loss_of.chunked
    tokens = torch.randint(50, (3, 17))
    loss, parts = loss_of(Batch.of(tokens))
    assert torch.equal(parts, loss.detach().view(1))
    loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = model(tokens, labels=tokens).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for ours, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_architectures_that_change_their_logits_keep_their_own(cap):
    """A cap of 30, Gemma's own, changes an untrained model's logits by less than 1e-4."""
    model = tiny("gemma2", vocab_size=50, final_logit_softcapping=cap)
    loss_of = CausalLoss(model)
    assert not loss_of.chunked
    assert model.training, "asking does not change the mode"
    tokens = torch.randint(50, (2, 9))
    torch.testing.assert_close(loss_of(Batch.of(tokens))[0], model(tokens, labels=tokens).loss)


def test_a_head_with_a_bias_learns_it():
    model = tiny("phi", vocab_size=50)
    assert not model.lm_head.bias.any(), "at first it changes no logit"
    CausalLoss(model)(Batch.of(torch.randint(50, (2, 9))))[0].backward()
    assert model.lm_head.bias.grad.any()


def test_a_teacher_that_is_the_student_teaches_nothing():
    hidden, head = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4)
    labels = torch.randint(7, (9,))
    targets = Targets(hidden.detach(), head, TeacherConfig("teacher", 1.0, 0.0, 2.0))
    loss, parts = chunked_loss(hidden, head, labels, 4, targets)
    loss.backward()
    assert loss.item() == parts[1].item() == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_large_and_small_logits_stay_finite(scale):
    hidden, head = (torch.randn(9, 4) * scale).requires_grad_(), torch.randn(7, 4)
    targets = Targets(torch.randn(9, 4) * scale, head, TeacherConfig("teacher", 1.0, 1.0, 0.5))
    loss, parts = chunked_loss(hidden, head, torch.randint(7, (9,)), 4, targets)
    loss.backward()
    assert parts.isfinite().all()
    assert hidden.grad.isfinite().all()
