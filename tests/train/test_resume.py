"""Stopped and gone on with: rows and weights are those of an undisturbed run, to the last bit."""

import signal

import pytest
import torch

from histories import stop_at, timeless
from sparse_bitnet.train import TrainingInterruptedError, train
from sparse_bitnet.train.presets import preset_config
from tiny_models import preset_model


def plain(directory, chats):
    return {}


def dropout_and_patterns(directory, chats):
    shape = preset_config("tiny", 64)
    shape.attention_dropout = 0.2
    shape.save_pretrained(directory)
    return {
        "model": {"source": str(directory / "config.json")},
        "sparsity": {"pattern": "4:8", "until": {0.25: "dense", 0.7: "6:8"}},
    }


def teacher_and_quantization(directory, chats):
    """Stopped between full precision and integers."""
    preset_model(7, hidden_size=128, intermediate_size=96).save_pretrained(directory)
    return {
        "teacher": {"source": str(directory)},
        "sparsity": {"quantization": {"until": 0.7, "shape": "sigmoid"}},
    }


def conversations_recomputed(directory, chats):
    preset_model(0).save_pretrained(directory)
    return {
        "data": {"path": str(chats), "micro_batch_size": 4},
        "model": {"activation_checkpointing": True},
        "sparsity": {"quantization": {"until": 0.3}},
        "teacher": {"source": str(directory), "weight": 0.1},
        "run": {"checkpoint_every": 4},
    }


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (plain, signal.SIGTERM),
        (plain, signal.SIGINT),
        (dropout_and_patterns, signal.SIGTERM),
        (teacher_and_quantization, signal.SIGTERM),
        (conversations_recomputed, signal.SIGTERM),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(recipe, chats, tmp_path, make, number):
    sections = make(tmp_path / "source", chats)
    whole = train(recipe("whole", **sections))
    config = recipe("stopped", **sections)
    with pytest.raises(TrainingInterruptedError) as caught:
        train(config, stop_at(5, number))
    assert caught.value.exit_code == 128 + number
    message = str(caught.value)
    assert message.startswith(f"stopped by {number.name} after step 5 of 12; saved ")
    assert message.endswith("step-00000005. The same command goes on from there")
    assert max(row["step"] for row in timeless(config.run.directory)) == 5
    resumed = train(config)
    assert timeless(resumed) == timeless(whole)
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
