"""Sequences of several documents: they do not see each other, and answers alone are learned."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.loader import IGNORED, Loader
from sparse_bitnet.data.shards import TokenShards
from sparse_bitnet.nn import convert
from sparse_bitnet.train import train
from sparse_bitnet.train.config import TeacherConfig
from sparse_bitnet.train.loss import CausalLoss
from sparse_bitnet.train.model import check_documents
from sparse_bitnet.train.teacher import Teacher
from tiny_models import preset_model, tiny

VOCABULARY = 64  # of the tokens in conftest.py


WINDOWS = {
    "num_hidden_layers": 1,
    "use_sliding_window": True,
    "sliding_window": 3,
    "layer_types": ["sliding_attention"],
}


@pytest.mark.parametrize("changes", [{}, WINDOWS], ids=["sdpa", "windows"])
@pytest.mark.parametrize("converted", [False, True])
def test_a_packed_document_has_the_logits_that_it_has_alone(changes, converted):
    model = preset_model(0, **changes).eval()
    if converted:
        convert(model, "6:8")
    lengths = [[5, 1, 9, 3], [18], [1, 1, 2, 14]]
    tokens = torch.randint(VOCABULARY, (3, 18))
    positions = torch.tensor([[p for n in row for p in range(n)] for row in lengths])
    loss_of = CausalLoss(model)
    with torch.no_grad():
        hidden, head = loss_of.last_hidden(input_ids=tokens, position_ids=positions)
        assert head is not None
        for row, documents in enumerate(lengths):
            start = 0
            for length in documents:
                here = slice(start, start + length)
                alone = model(tokens[row : row + 1, here]).logits[0]
                # Sums of attention in another order; where activations are rounded to int8, one on
                # the edge may move a step.
                room = 1e-2 if converted else 1e-5
                torch.testing.assert_close(hidden[row, here] @ head.T, alone, rtol=0, atol=room)
                start += length
        mixed = model(tokens).logits[0] - hidden[0] @ head.T
    assert mixed.abs().max() > 0.05  # which is what they would see of each other


def lfm2():
    return tiny("lfm2", layer_types=["conv", "full_attention"])


GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}


@pytest.mark.parametrize(
    "make", [lambda: preset_model(0), lambda: tiny("gptj", **GPTJ), lambda: tiny("mixtral")]
)
def test_attention_that_begins_anew_is_accepted(make):
    check_documents(make())


@pytest.mark.parametrize(
    "make", [lambda: tiny("mamba", num_hidden_layers=1), lfm2, lambda: tiny("jamba", num_experts=2)]
)
def test_what_a_recurrence_leaks_is_refused(make):
    """Little of it in an untrained model: 5e-5 of the logits in Lfm2, 1e-3 in Jamba."""
    with pytest.raises(ConfigError, match="ForCausalLM lets tokens see the documents before"):
        check_documents(make())


def test_a_teacher_that_leaks_is_refused(recipe, chats, tokens):
    """For conversations; ordinary text has no documents to keep apart."""
    teacher = recipe.directory / "teacher"
    lfm2().save_pretrained(teacher)
    sections = {"teacher": {"source": str(teacher)}, "schedule": {"steps": 1}}
    with pytest.raises(ConfigError, match="Lfm2ForCausalLM lets tokens see the documents before"):
        train(recipe("chats", data={"path": str(chats)}, **sections))
    train(recipe("text", data={"path": str(tokens)}, **sections))


@pytest.mark.parametrize("make", [lambda: preset_model(0), lambda: tiny("mixtral")])
def test_a_trained_teacher_is_accepted(make, tmp_path):
    """Its activations are rounded to int8, of each token by itself."""
    model = make()
    convert(model, "6:8")
    model.save_pretrained(tmp_path)
    Teacher(TeacherConfig(str(tmp_path)), model, documents=True)


def slow_loss(model, batch):
    """Summed over the labels of each document alone, and how many they are."""
    assert batch.positions is not None
    total, count = torch.zeros(()), 0
    for ids, labels, positions in zip(batch.inputs, batch.labels, batch.positions, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            if (labels[start:end] != IGNORED).any():
                logits = model(ids[start:end].unsqueeze(0)).logits[0]
                total = total + F.cross_entropy(logits, labels[start:end], reduction="sum")
                count += int((labels[start:end] != IGNORED).sum())
    return total, count


@pytest.mark.parametrize("micro", [8, 2])
def test_a_step_is_the_mean_over_all_answers(recipe, chats, monkeypatch, micro):
    """Micro-batches of other counts included: the gradient of the first step, and both losses."""
    seen = []
    monkeypatch.setattr(
        "sparse_bitnet.train.loop.clip_gradients",
        lambda parameters, _: seen.append([p.grad.clone() for p in parameters]) or torch.zeros(()),
    )
    config = recipe(
        data={"path": str(chats), "micro_batch_size": micro},
        sparsity={"kind": "bf16", "pattern": "dense"},
        schedule={"steps": 1},
        optimizer={"learning_rate": 1e-9, "weight_decay": 0.0},
    )
    result = train(config)
    model = result.model
    model.train()
    loss, count = slow_loss(model, Loader(TokenShards(chats / "train"), 32, 8, seed=0).batch(0))
    (loss / count).backward()
    assert result.loss == pytest.approx(loss.item() / count, rel=1e-4)
    wanted = [p.grad for p in model.parameters()]
    for got, expected in zip(seen[0], wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    validation = Loader(TokenShards(chats / "validation"), 32, 8, seed=0)
    parts = [slow_loss(model, validation.batch(step)) for step in range(2)]
    mean = sum(part.item() for part, _ in parts) / sum(count for _, count in parts)
    assert result.validation_loss == pytest.approx(mean, rel=1e-4)


def test_text_with_documents_apart(recipe, tokens):
    """EOS is id 0 of these tokens; the loss of a run changes, and it still learns."""
    runs = {
        flag: train(recipe(str(flag), data={"separate_documents": flag})) for flag in (False, True)
    }
    assert runs[True].loss != runs[False].loss and runs[True].loss < 4.2


def test_a_cuda_graph_is_refused(recipe, chats):
    with pytest.raises(ConfigError, match="cannot hold where documents begin"):
        train(recipe(data={"path": str(chats)}, run={"cuda_graph": True}))
