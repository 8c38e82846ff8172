"""``Trainer`` with a teacher: the example of the docs, and its losses against those of the loop."""

import pickle
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.loader import IGNORED, Batch
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.nn import SparseBitLinear, convert
from sparse_bitnet.train.callback import SparseBitNetCallback
from sparse_bitnet.train.config import TeacherConfig
from sparse_bitnet.train.hidden import HiddenStates
from sparse_bitnet.train.loss import CausalLoss
from sparse_bitnet.train.parallel import blocks
from sparse_bitnet.train.teacher import Teacher
from sparse_bitnet.train.trainer import TeacherMixin
from tiny_models import preset_model, tiny


def rows():
    torch.manual_seed(1)
    found = []
    for number in range(16):
        ids = torch.randint(64, (12,))
        labels = ids.clone()
        labels[: number % 5] = IGNORED  # as of prompts: rows differ in how many count
        found.append({"input_ids": ids, "labels": labels})
    return found


def distilling(model, directory, **options):
    """The example's class, its teacher in ``directory``."""

    class Distilling(TeacherMixin, Trainer):
        teacher = TeacherConfig(str(directory), temperature=2.0, hidden_layers=[0, 1])

    arguments = TrainingArguments(str(directory / "out"), use_cpu=True, report_to=[], **options)
    callbacks = [SparseBitNetCallback("6:8")]
    data = {"train_dataset": rows(), "eval_dataset": rows()}
    return Distilling(model, arguments, **data, callbacks=callbacks)


def run(directory, model, accumulation=1):
    """Four steps of eight rows."""
    trainer = distilling(
        model,
        directory,
        max_steps=4,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.01,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="no",
    )
    trainer.train()
    return trainer


def converted():
    model = preset_model(3)
    convert(model, "6:8")
    return model


def test_as_in_the_docs(tmp_path):
    """The losses of the loop's own module, logged; accumulation changes nothing."""
    preset_model(7).save_pretrained(tmp_path)
    trainer = run(tmp_path, converted())
    found = [row for row in trainer.state.log_history if "loss" in row]
    names = ("cross_entropy", "teacher_loss", "hidden_loss")
    for row in found:
        assert row["loss"] == pytest.approx(sum(row[name] for name in names), abs=2e-3)
        assert "zeros_before_mask" in row
    assert all(found[-1][name] < found[0][name] for name in names)
    assert any("eval_loss" in row for row in trainer.state.log_history)
    again = run(tmp_path, converted(), 2)
    others = [row for row in again.state.log_history if "loss" in row]
    for row, other in zip(found, others, strict=True):
        for name in ("loss", *names):
            assert other[name] == pytest.approx(row[name], rel=2e-3), name


def test_the_losses_are_the_loops(tmp_path):
    preset_model(7).save_pretrained(tmp_path)
    model = converted().train()
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels")}
    trainer = distilling(model, tmp_path)
    loss, config = trainer.compute_loss(model, batch), trainer.teacher
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model = converted().train()
    states = HiddenStates(blocks(model), config.hidden_layers, "student")
    labels = pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    same = Batch(batch["input_ids"], labels, divisor=(labels != IGNORED).sum())
    wanted, _ = CausalLoss(model, states)(same, Teacher(config, preset_model(3)))
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_nothing_is_left_on_the_model(tmp_path):
    """No hook, so it can be pickled and an evaluation keeps no activations; it trains again."""
    preset_model(7).save_pretrained(tmp_path)
    model = converted()
    for _ in range(2):
        trainer = run(tmp_path, model)
        assert not any(module._forward_hooks for module in model.modules())
        pickle.dumps(model)
    kept = []

    class Watch(TrainerCallback):
        def on_evaluate(self, *_, **__):
            kept.extend(trainer._pair[0].states._kept.values())

    trainer.add_callback(Watch())
    trainer.train()
    assert kept == []
    assert "hidden_loss" in trainer.state.log_history[0]


def test_parts_are_means_over_ranks(tmp_path, monkeypatch):
    preset_model(7).save_pretrained(tmp_path)
    plain = run(tmp_path, converted())
    ways = []

    def reduce(_self, tensor, reduction):
        ways.append(reduction)
        return tensor + 1  # as if another rank had 2 more

    monkeypatch.setattr("accelerate.Accelerator.reduce", reduce)
    several = run(tmp_path, converted())
    assert ways == ["mean"] * 4
    for name in ("cross_entropy", "teacher_loss", "hidden_loss"):
        one, other = (run.state.log_history[0][name] for run in (plain, several))
        assert other == pytest.approx(one + 1)


def test_batches_without_labels(tmp_path):
    model = converted().train()
    with pytest.raises(ConfigError, match="the batches have no labels"):
        distilling(model, tmp_path).compute_loss(model, {"input_ids": None})


@pytest.mark.parametrize("leaks", ["student", "teacher"])
def test_packed_documents_that_leak(tmp_path, leaks):
    models = {"student": preset_model(3), "teacher": preset_model(7)}
    models[leaks] = tiny("lfm2", hidden_size=64, layer_types=["conv", "full_attention"])
    models["teacher"].save_pretrained(tmp_path)
    ids = torch.randint(64, (1, 12))
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(6).repeat(1, 2)}
    student = models["student"].train()
    with pytest.raises(ConfigError, match="Lfm2ForCausalLM lets tokens see the documents before"):
        distilling(student, tmp_path).compute_loss(student, packed)


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset_model(7, vocab_size=272).save_pretrained("dense")
    train_bpe(["some text, some more text"], 260).save_pretrained("dense")
    text = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert code.count('TrainingArguments("out", ') == 1
    code = code.replace('TrainingArguments("out", ', 'TrainingArguments("out", use_cpu=True, ')
    exec(compile(code, "docs/trainer.md", "exec"), {"rows": rows(), "__name__": "example"})
    assert (tmp_path / "packed" / "model.safetensors").is_file()
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
    again = AutoModelForCausalLM.from_pretrained("trained")
    assert isinstance(again.model.layers[0].mlp.up_proj, SparseBitLinear)
