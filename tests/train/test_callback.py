"""The schedule and the monitor inside a real Hugging Face Trainer."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparse_bitnet.core import ConfigError, PatternError
from sparse_bitnet.nn import convert, master_weights
from sparse_bitnet.train.callback import SparseBitNetCallback
from tiny_models import preset_model


class Spy(TrainerCallback):
    """What each step was taken with."""

    def __init__(self):
        self.patterns = []
        self.decays = []
        self.logs = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.patterns.append(str(next(master_weights(kwargs["model"])).pattern))
        self.decays.append([group["weight_decay"] for group in kwargs["optimizer"].param_groups])

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trainer(directory, callback, spy, converted=True, **more):
    model = preset_model(0, 32)
    if converted:
        convert(model, "6:8")
    rows = [{"input_ids": (ids := torch.arange(i, i + 8) % 32), "labels": ids} for i in range(32)]
    arguments = TrainingArguments(
        str(directory),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"logging_steps": 2, "save_strategy": "no", **more},
    )
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback, spy])


def test_schedule_and_monitor(tmp_path, capsys):
    spy = Spy()
    callback = SparseBitNetCallback("6:8", until={0.5: "dense"}, weight_decay_until=0.5)
    run = trainer(tmp_path, callback, spy)
    run.train()
    assert spy.patterns == ["dense"] * 4 + ["6:8"] * 4
    first_group = [decays[0] for decays in spy.decays]
    assert first_group[::2] == pytest.approx([0.1, 0.05, 0.0, 0.0])
    assert {decays[1] for decays in spy.decays} == {0.0}, "the group without decay keeps none"
    rows = [row for row in run.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["density"] for row in rows] == [1.0, 1.0, 0.75, 0.75]
    assert ["flip_rate" in row for row in rows] == [False, False, True, True]
    assert all(0 < row["flip_rate"] < 0.5 for row in rows[2:])
    assert all(0.2 < row["zeros_before_mask"] < 0.5 for row in rows)
    # Callbacks after this one see the figures too; the summary of the run has none.
    assert ["zeros_before_mask" in logs for logs in spy.logs] == [True] * 4 + [False]
    assert "flip_rate" in capsys.readouterr().out


def test_continues_in_the_right_pattern(tmp_path):
    spy = Spy()
    callback = SparseBitNetCallback("6:8", until={0.25: "dense", 0.75: "7:8"})
    run = trainer(tmp_path, callback, spy, save_strategy="steps", save_steps=4)
    run.train()
    whole = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert spy.patterns == ["dense"] * 2 + ["7:8"] * 4 + ["6:8"] * 2
    spy = Spy()
    again = trainer(tmp_path, callback, spy, save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert spy.patterns == ["7:8"] * 2 + ["6:8"] * 2
    losses = [row["loss"] for row in again.state.log_history if "loss" in row]
    assert losses == pytest.approx(whole, abs=1e-6)


def test_decay_stays_as_it_is_unless_asked(tmp_path):
    spy = Spy()
    trainer(tmp_path, SparseBitNetCallback("6:8"), spy).train()
    assert spy.patterns == ["6:8"] * 8
    assert {decays[0] for decays in spy.decays} == {0.1}


def test_refuses_unconverted_models_and_wrong_schedules(tmp_path):
    run = trainer(tmp_path, SparseBitNetCallback("6:8"), Spy(), converted=False)
    with pytest.raises(ConfigError, match="the model is not converted; call"):
        run.train()
    for callback in (SparseBitNetCallback("3:7"), SparseBitNetCallback("6:8", until={0.9: "3:7"})):
        spy = Spy()
        with pytest.raises(PatternError, match=r"q_proj\.weight .* M = 7 of pattern 3:7"):
            trainer(tmp_path, callback, spy).train()
        assert not spy.patterns
    with pytest.raises(PatternError):
        SparseBitNetCallback("8:6")
    with pytest.raises(ConfigError, match="between 0 and 1"):
        SparseBitNetCallback("6:8", until={2.0: "dense"})
