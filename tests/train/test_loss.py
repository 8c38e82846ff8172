"""The chunked loss against PyTorch's over full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PhiConfig, Qwen2Config

from sparse_bitnet.data.loader import Batch
from sparse_bitnet.train import loss as loss_module
from sparse_bitnet.train.config import TeacherConfig
from sparse_bitnet.train.loss import (
    CausalLoss,
    Targets,
    chunked_loss,
)
from sparse_bitnet.train.presets import preset_config
from tiny_models import tiny


def full(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ head.T).flatten(0, -2), labels.flatten())


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 9),
    features=st.integers(1, 5),
    vocabulary=st.integers(1, 11),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_value_and_gradients_in_float64(
    tokens: int, features: int, vocabulary: int, chunk: int, seed: int, scale: float
) -> None:
    torch.manual_seed(seed)
    hidden = (torch.randn(1, tokens, features, dtype=torch.float64) * scale).requires_grad_()
    head = torch.randn(vocabulary, features, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens))
    loss = chunked_loss(hidden, head, labels, chunk)[0]
    got = torch.autograd.grad(3.0 * loss, (hidden, head))
    reference = full(hidden, head, labels)
    expected = torch.autograd.grad(3.0 * reference, (hidden, head))
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 7, 16384, 20480, 16385, 98304])
def test_chunks_are_equal_where_they_can_be(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 2**29)
    chunk = loss_module._chunk(tokens, 151936, "cpu")
    assert 1 <= chunk * 151936 <= 2**29
    assert 2 * chunk * 151936 > min(2**29, tokens * 151936)
    assert tokens % chunk == 0 or tokens == 16385


@pytest.mark.parametrize("how", [None, TeacherConfig("teacher", 2.0, 0.5, 3.0)])
def test_the_form_for_fusion_is_the_same(how: TeacherConfig | None) -> None:
    logits, labels = torch.randn(7, 11, dtype=torch.bfloat16), torch.randint(11, (7,))
    teacher = None if how is None else torch.randn(7, 11, dtype=torch.bfloat16)
    ours = loss_module._loss_and_slope_for_fusion(logits.clone(), labels, teacher, how)
    theirs = loss_module._loss_and_slope(logits.clone(), labels, teacher, how)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
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


def test_autocast_multiplies_in_bf16_and_sums_in_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 32, requires_grad=True)
    head = torch.randn(100, 32, requires_grad=True)
    labels = torch.randint(100, (64,))
    exact = full(hidden, head, labels)
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

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_full_logits_are_never_there() -> None:
    tokens, vocabulary, chunk = 256, 1000, 8
    hidden = torch.randn(tokens, 4, requires_grad=True)
    head = torch.randn(vocabulary, 4, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with _Largest() as largest:
        chunked_loss(hidden, head, labels, chunk)[0].backward()
    assert largest.elements == chunk * vocabulary


def test_default_chunk_follows_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 2**19)
    hidden = torch.randn(10, 2, requires_grad=True)
    head = torch.randn(151_936, 2)
    with _Largest() as largest:
        chunked_loss(hidden, head, torch.zeros(10, dtype=torch.int64))[0].backward()
    assert largest.elements == 2 * 151_936  # three would fit, but five parts of two are equal


@pytest.mark.parametrize("tied", [True, False])
def test_model_loss_equals_that_of_transformers(tied: bool) -> None:
    shape: Qwen2Config = preset_config("tiny", 50)
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
def test_architectures_that_change_their_logits_keep_their_own(cap: float) -> None:
    """A cap of 30, Gemma's own, changes an untrained model's logits by less than 1e-4."""
    model = tiny("gemma2", vocab_size=50, final_logit_softcapping=cap)
    loss_of = CausalLoss(model)
    assert not loss_of.chunked
    assert model.training, "asking does not change the mode"
    tokens = torch.randint(50, (2, 9))
    torch.testing.assert_close(loss_of(Batch.of(tokens))[0], model(tokens, labels=tokens).loss)


def test_a_head_with_a_bias_learns_it() -> None:
    shape = PhiConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = AutoModelForCausalLM.from_config(shape)
    assert not model.lm_head.bias.any(), "at first it changes no logit"
    CausalLoss(model)(Batch.of(torch.randint(50, (2, 9))))[0].backward()
    assert model.lm_head.bias.grad.any()


def distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, how: TeacherConfig
) -> list[Tensor]:
    """The definition over full logits: the loss, the cross-entropy, and T²·KL."""
    t = how.temperature
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    divergence = t**2 * (p * (p.log() - q.log())).sum(-1).mean()
    entropy = F.cross_entropy(student, labels)
    return [how.cross_entropy * entropy + how.weight * divergence, entropy, divergence]


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 11),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 1000),
    divergence=st.sampled_from([0.0, 1.0, 2.5]),
    entropy=st.sampled_from([0.0, 1.0, 0.3]),
    temperature=st.sampled_from([0.5, 1.0, 5.0]),
    heads=st.tuples(st.booleans(), st.booleans()),
)
def test_distillation_in_float64(
    tokens: int,
    vocabulary: int,
    chunk: int,
    seed: int,
    divergence: float,
    entropy: float,
    temperature: float,
    heads: tuple[bool, bool],
) -> None:
    """Student and teacher with or without a head; of other widths."""
    torch.manual_seed(seed)

    def last(has_head: bool, width: int) -> tuple[Tensor, Tensor | None]:
        hidden = torch.randn(1, tokens, width if has_head else vocabulary, dtype=torch.float64)
        head = torch.randn(vocabulary, width, dtype=torch.float64) if has_head else None
        return hidden, head

    hidden, head = last(heads[0], 5)
    theirs, their_head = last(heads[1], 3)
    labels = torch.randint(vocabulary, (1, tokens))
    how = TeacherConfig("teacher", divergence, entropy, temperature)
    leaves = [hidden.requires_grad_(), *([] if head is None else [head.requires_grad_()])]
    loss, parts = chunked_loss(hidden, head, labels, chunk, Targets(theirs, their_head, how))
    got = torch.autograd.grad(3.0 * loss, leaves)
    assert not parts.requires_grad
    student = (hidden if head is None else hidden @ head.T).flatten(0, -2)
    teacher = (theirs if their_head is None else theirs @ their_head.T).flatten(0, -2)
    reference, *of_it = distillation(student, teacher, labels.flatten(), how)
    expected = torch.autograd.grad(3.0 * reference, leaves)
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts, torch.stack(of_it).detach(), rtol=1e-12, atol=1e-12)
    for ours, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    hidden, head = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4)
    labels = torch.randint(7, (9,))
    targets = Targets(hidden.detach(), head, TeacherConfig("teacher", 1.0, 0.0, 2.0))
    loss, parts = chunked_loss(hidden, head, labels, 4, targets)
    loss.backward()
    assert loss.item() == parts[1].item() == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_large_and_small_logits_stay_finite(scale: float) -> None:
    hidden, head = (torch.randn(9, 4) * scale).requires_grad_(), torch.randn(7, 4)
    targets = Targets(torch.randn(9, 4) * scale, head, TeacherConfig("teacher", 1.0, 1.0, 0.5))
    loss, parts = chunked_loss(hidden, head, torch.randint(7, (9,)), 4, targets)
    loss.backward()
    assert parts.isfinite().all()
    assert hidden.grad.isfinite().all()


def test_two_full_logits_are_never_there() -> None:
    tokens, vocabulary, chunk = 256, 1000, 8
    hidden = torch.randn(tokens, 4, requires_grad=True)
    head = torch.randn(vocabulary, 4, requires_grad=True)
    targets = Targets(torch.randn(tokens, 6), torch.randn(vocabulary, 6), TeacherConfig())
    labels = torch.randint(vocabulary, (tokens,))
    with _Largest() as largest:
        chunked_loss(hidden, head, labels, chunk, targets)[0].backward()
    assert largest.elements == chunk * vocabulary


def test_a_teacher_halves_the_default_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 8000)
    hidden, head = torch.randn(8, 2, requires_grad=True), torch.randn(1000, 2)
    targets = Targets(torch.randn(8, 2), head, TeacherConfig())
    with _Largest() as largest:
        chunked_loss(hidden, head, torch.zeros(8, dtype=torch.int64), None, targets)
    assert largest.elements == 4 * 1000


@pytest.mark.parametrize("chunk", [1, 5, 24])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_tokens_without_a_label(chunk: int, has_teacher: bool) -> None:
    """Against full logits of the other tokens alone, gradients included; divided as asked."""
    hidden = torch.randn(24, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (24,)).masked_fill(torch.rand(24) < 0.6, -100)
    labels[:2] = torch.tensor([-100, 3])
    theirs, their_head = torch.randn(24, 6).double(), torch.randn(11, 6).double()
    how = TeacherConfig("teacher", 2.0, 0.5, 3.0)
    targets = Targets(theirs, their_head, how) if has_teacher else None
    divisor = torch.tensor(7.0)
    loss, parts = chunked_loss(hidden, head, labels, chunk, targets, divisor)
    mine = torch.autograd.grad(loss, (hidden, head))
    kept = labels != -100
    logits = hidden[kept] @ head.T
    entropy = F.cross_entropy(logits, labels[kept], reduction="sum") / 7
    expected = entropy
    if has_teacher:
        p = ((theirs @ their_head.T)[kept] / 3).softmax(-1)
        divergence = 9 * F.kl_div((logits / 3).log_softmax(-1), p, reduction="sum") / 7
        torch.testing.assert_close(parts[1], divergence.detach())
        expected = 0.5 * entropy + 2 * divergence
    torch.testing.assert_close(parts[0], entropy.detach())
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(mine, torch.autograd.grad(expected, (hidden, head)), strict=True):
        torch.testing.assert_close(got, wanted)
    fused, _ = loss_module._loss_and_slope_for_fusion(logits.detach(), labels[kept])
    plain, _ = loss_module._loss_and_slope((hidden @ head.T).detach(), labels)
    torch.testing.assert_close(fused.double(), plain, rtol=1e-6, atol=0)


def test_no_label_at_all() -> None:
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
    loss, _ = chunked_loss(hidden, head, torch.full((4,), -100), divisor=torch.tensor(3.0))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()
