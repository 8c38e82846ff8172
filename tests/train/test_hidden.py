"""The loss of hidden states: against plain sums, and in runs."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from histories import series
from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.loader import IGNORED, Batch
from sparse_bitnet.nn import convert
from sparse_bitnet.train import train
from sparse_bitnet.train.config import TeacherConfig
from sparse_bitnet.train.hidden import HiddenStates, hidden_loss
from sparse_bitnet.train.loss import CausalLoss
from sparse_bitnet.train.parallel import blocks
from sparse_bitnet.train.teacher import Teacher
from tiny_models import preset_model

LAYERS = [0, 1]


@pytest.fixture
def directory(tmp_path):
    """A teacher of the student's shape."""
    preset_model(7).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_the_loss_of_a_model(directory):
    """Against transformers' own hidden states of both, gradients included; some labels ignored."""
    student = preset_model(3).train()
    convert(student, "6:8")
    config = TeacherConfig(str(directory), hidden_layers=LAYERS, hidden_weight=3.0)
    teacher = Teacher(config, preset_model(3))
    batch = Batch.of(torch.randint(64, (3, 17)))
    labels = batch.labels.clone()
    labels[:, ::3] = IGNORED
    counted = (labels != IGNORED).sum()
    batch = batch._replace(labels=labels, divisor=counted)
    loss_of = CausalLoss(student, HiddenStates(blocks(student), LAYERS, "student"))
    loss, parts = loss_of(batch, teacher)
    loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    # hidden_states[0] is the embedding; those of a last block are after the final norm.
    kept = {}
    for name, one in (("own", student), ("other", model)):
        one.model.layers[1].register_forward_hook(
            lambda _m, _a, output, name=name: kept.__setitem__(name, output)
        )
    theirs = model(batch.inputs, output_hidden_states=True)
    ours = student(batch.inputs, output_hidden_states=True)
    pairs = [
        (ours.hidden_states[1], theirs.hidden_states[1].detach()),
        (kept["own"], kept["other"].detach()),
    ]
    apart = sum(((a - b).square().sum(-1) / b.square().sum(-1))[labels != IGNORED].sum() / 2
                for a, b in pairs) / counted  # fmt: skip
    log_q, p = ours.logits.log_softmax(-1), theirs.logits.detach().softmax(-1)
    divergence = F.kl_div(log_q, p, reduction="none").sum(-1)[labels != IGNORED].mean()
    entropy = F.cross_entropy(ours.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(parts, torch.stack([entropy, divergence, apart]).detach())
    (entropy + divergence + 3 * apart).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_tokens_of_any_size_count_alike():
    other = torch.randn(2, 5, 8)
    own = other + 0.1 * torch.randn_like(other)
    labels = torch.zeros(2, 5, dtype=torch.int64)
    one = hidden_loss([own], [other], labels)
    sizes = torch.logspace(-3, 3, 5).view(1, 5, 1)
    torch.testing.assert_close(hidden_loss([own * sizes], [other * sizes], labels), one)
    assert hidden_loss([torch.zeros(2, 5, 8)], [torch.zeros(2, 5, 8)], labels) == 0


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"micro_batch_size": 2}},
        {"model": {"activation_checkpointing": True}},
        pytest.param({"run": {"compile": "on"}}, marks=pytest.mark.slow),
    ],
    ids=["micro", "recomputed", "compiled"],
)
def test_a_run(recipe, directory, sections):
    teacher = {"source": str(directory), "hidden_layers": LAYERS, "hidden_weight": 2.0}
    steps = {"steps": 6}
    plain = train(recipe("plain", teacher=teacher, schedule=steps))
    columns = ("loss", "teacher_loss", "hidden_loss")
    assert len(series(plain, "hidden_loss")) == 6
    assert series(plain, "hidden_loss")[-1] < series(plain, "hidden_loss")[0]
    other = train(recipe("other", teacher=teacher, schedule=steps, **sections))
    for column in columns:
        assert series(other, column) == pytest.approx(series(plain, column), abs=1e-3)
    assert not any(block._forward_hooks for block in blocks(plain.model))


def test_refusals(recipe, directory, tmp_path):
    with pytest.raises(ConfigError, match=r"hidden_layers: the teacher has blocks .* no 9"):
        train(recipe(teacher={"source": str(directory), "hidden_layers": [1, 9]}))
    preset_model(7, hidden_size=128, intermediate_size=96).save_pretrained(tmp_path / "wide")
    with pytest.raises(ConfigError, match="have 64 features and the teacher's 128"):
        train(recipe("wide", teacher={"source": str(tmp_path / "wide"), "hidden_layers": [0]}))
    assert not (recipe.directory / "wide" / "metrics.jsonl").exists()  # before any work


def test_a_teacher_on_a_device_of_its_own(directory):
    """Whatever is moved there and back; a machine without a GPU knows one device by two names."""
    batch = Batch.of(torch.randint(64, (2, 9)))
    found = [
        Teacher(TeacherConfig(str(directory), hidden_layers=LAYERS, device=name), preset_model(3))(
            batch
        )
        for name in ("", "cpu:0")
    ]
    assert torch.equal(found[0].hidden, found[1].hidden)
    for one, other in zip(found[0].states, found[1].states, strict=True):
        assert torch.equal(one, other)
