"""Runs with a teacher: what it changes, what it must not, and which teachers are refused."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from histories import rows, series
from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.loader import Batch
from sparse_bitnet.data.tokenizer import tokenizer_hash, train_bpe
from sparse_bitnet.nn import convert
from sparse_bitnet.train import save_trained, train
from sparse_bitnet.train.config import SparsityConfig, TeacherConfig
from sparse_bitnet.train.loss import CausalLoss
from sparse_bitnet.train.recipe import load_recipe
from sparse_bitnet.train.teacher import Teacher
from tiny_models import preset_model, tiny


@pytest.fixture
def directory(tmp_path):
    """An untrained teacher, wider than the student."""
    preset_model(7, hidden_size=128, intermediate_size=96).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def gemma(vocabulary=64):
    """Caps its logits, so they are no plain product of the head."""
    return tiny("gemma2", final_logit_softcapping=0.5, vocab_size=vocabulary)


@pytest.mark.parametrize("teacher_is", ["plain", "capped"])
@pytest.mark.parametrize("student_is", ["plain", "capped"])
def test_the_loss_of_a_model_with_a_teacher(tmp_path, student_is, teacher_is):
    """Against full logits of both, gradients included."""
    models = {"plain": lambda: preset_model(7), "capped": gemma}
    models[teacher_is]().save_pretrained(tmp_path)
    student = models[student_is]().train()
    convert(student, "6:8")
    config = TeacherConfig(str(tmp_path), weight=2.0, cross_entropy=0.5, temperature=3.0)
    teacher = Teacher(config, preset_model(3))
    tokens = torch.randint(64, (3, 17))
    loss, parts = CausalLoss(student)(Batch.of(tokens), teacher)
    loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens[:, :-1]).logits.detach()
    logits = student(tokens[:, :-1]).logits
    log_q, p = (logits / 3).log_softmax(-1), (theirs / 3).softmax(-1)
    divergence = 9 * F.kl_div(log_q, p, reduction="none").sum(-1).mean()
    entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(parts, torch.stack([entropy, divergence]).detach())
    (0.5 * entropy + 2 * divergence).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert not teacher.model.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())


def test_a_run_with_a_teacher(recipe, capsys):
    """The teacher has learned the data: its student comes nearer to it, and so to the data."""
    dense_one = {"kind": "bf16", "pattern": "dense"}
    taught = train(recipe("teacher", sparsity=dense_one, schedule={"steps": 80}))
    teacher = {"source": str(taught.model_directory), "cross_entropy": 0.0}
    result = train(recipe("student", teacher=teacher, schedule={"steps": 60}))
    assert rows(result)[0].keys() == {"step", "teacher_validation_loss"}
    loss = rows(result)[0]["teacher_validation_loss"]
    assert loss == pytest.approx(taught.validation_loss, abs=1e-6)
    assert f"validation loss {loss:.4f}" in capsys.readouterr().err
    distances = series(result, "teacher_loss")
    assert len(distances) == 60
    assert distances[-1] < 0.5 * distances[0]
    # The loss is the student's cross-entropy, so that runs can be compared.
    assert series(result, "loss")[0] == pytest.approx(4.16, abs=0.1)
    assert result.loss == series(result, "loss")[-1] < 3.5


def test_cross_entropy_alone_is_a_run_without_a_teacher(recipe, directory):
    alone = train(recipe("alone"))
    with_one = train(recipe("with", teacher={"source": str(directory), "weight": 0.0}))
    assert series(with_one, "loss") == series(alone, "loss")


def test_a_trained_teacher_computes_as_it_was_trained(tmp_path):
    model = preset_model(3)
    convert(model, "6:8")
    tokens = torch.randint(64, (2, 9))
    expected = model.eval()(tokens[:, :-1]).logits
    save_trained(model, None, tmp_path / "model", SparsityConfig())
    targets = Teacher(TeacherConfig(str(tmp_path / "model")), preset_model(3))(Batch.of(tokens))
    assert torch.equal(targets.logits(slice(None)).view_as(expected), expected)


@pytest.mark.parametrize("teacher_is", ["plain", "capped"])
def test_rows_beyond_the_students_are_padding(tmp_path, teacher_is):
    """Where both know the data's tokenizer: the smallest and the largest Qwen2.5 differ so."""
    make = {"plain": lambda: preset_model(7, vocabulary=288), "capped": lambda: gemma(288)}
    make[teacher_is]().save_pretrained(tmp_path)
    tokenizer = train_bpe(["some text, some more text"], 260)
    tokenizer.save_pretrained(tmp_path)
    config, student = TeacherConfig(str(tmp_path)), preset_model(3, vocabulary=264)
    tokens = torch.randint(260, (2, 9))
    targets = Teacher(config, student, tokenizer_hash(tokenizer))(Batch.of(tokens))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens[:, :-1]).logits
    expected = theirs[..., :264].flatten(0, 1)
    torch.testing.assert_close(targets.logits(slice(None)), expected)
    loss, _ = CausalLoss(student)(Batch.of(tokens), lambda _: targets)
    assert loss.isfinite()
    with pytest.raises(ConfigError, match="has a vocabulary of 288, the student one of 264"):
        Teacher(config, student)


class TestRefusals:
    def test_no_directory(self, tmp_path):
        with pytest.raises(ConfigError, match="no Hugging Face directory"):
            Teacher(TeacherConfig(str(tmp_path / "none")), preset_model(3))
        (tmp_path / "m.gguf").touch()
        with pytest.raises(ConfigError, match=r"m\.gguf is a GGUF file; make a directory of it"):
            Teacher(TeacherConfig(str(tmp_path / "m.gguf")), preset_model(3))

    def test_another_vocabulary(self, recipe, tmp_path):
        preset_model(0, vocabulary=72).save_pretrained(tmp_path / "teacher")
        with pytest.raises(ConfigError, match="has a vocabulary of 72, the student one of 64"):
            train(recipe(teacher={"source": str(tmp_path / "teacher")}))

    def test_another_tokenizer(self, directory):
        tokenizer = train_bpe(["some text, some more text"], 260)
        tokenizer.save_pretrained(directory)
        config = TeacherConfig(str(directory))
        Teacher(config, preset_model(3), tokenizer_hash(tokenizer))
        with pytest.raises(ConfigError, match="another tokenizer than the data"):
            Teacher(config, preset_model(3), "0" * 64)

    def test_no_such_device(self, directory):
        with pytest.raises(ConfigError, match="nonsense"):
            Teacher(TeacherConfig(str(directory), device="nonsense"), preset_model(3))


def test_teacher_on_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {path: somewhere}\n")
    for arguments in (["--teacher", "there"], ["--teacher=there"], ["--teacher.source", "there"]):
        config = load_recipe(path, [*arguments, "--teacher.temperature", "5"])
        assert config.teacher == TeacherConfig("there", temperature=5.0)


def test_another_teacher_is_another_run(recipe, directory, tmp_path):
    train(recipe(teacher={"source": str(directory)}, schedule={"steps": 2}))
    shutil.copytree(directory, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"teacher\.source is"):
        train(recipe(teacher={"source": str(tmp_path / "other")}, schedule={"steps": 2}))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"weight": 5.0}, "weight is 5.0 but there is no teacher"),
        ({"hidden_layers": [0]}, "hidden_layers is .0. but there is no teacher"),
        ({"source": "dense", "hidden_layers": [1, 0, 1]}, "names a block twice"),
    ],
)
def test_settings_that_would_do_nothing(given, why):
    with pytest.raises(ConfigError, match=why):
        TeacherConfig(**given)
