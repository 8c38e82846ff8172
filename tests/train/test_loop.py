"""Whole runs in one process."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from histories import rows, series, stop_at
from sparse_bitnet.core import ConfigError, DataError, PatternError, TrainingError
from sparse_bitnet.nn import master_weights
from sparse_bitnet.train import TrainingInterruptedError, load_trained, train
from sparse_bitnet.train.command import train_command
from sparse_bitnet.train.optim import clip_gradients
from sparse_bitnet.train.presets import preset_config
from sparse_bitnet.train.recipe import config_from_dict, load_recipe
from tiny_models import preset_model


def losses(result):
    return series(result, "loss")


def test_a_run_from_start_to_model(recipe, capsys):
    config = recipe(schedule={"steps": 40}, run={"log_every": 10, "layers_every": 2})
    result = train(config)
    assert result.steps == 40
    assert result.tokens == 40 * 8 * 32
    assert result.linear_weights == 73_728
    assert result.loss < 3.0 < losses(result)[0] < math.log(64) + 0.2
    assert result.perplexity == pytest.approx(math.exp(result.validation_loss))
    assert [row["step"] for row in rows(result)] == [10, 20, 30, 40, 40]
    row = rows(result)[1]
    assert row["pattern"] == "6:8"
    assert 0 < row["flip_rate"] < 0.2
    assert 0.2 < row["zeros_before_mask"] < 0.5
    assert row["tokens_per_second"] > 0
    assert len(row["layers"]) == 14
    assert "layers" not in rows(result)[0]
    assert load_recipe(result.directory / "config.yaml") == config
    # What was exported computes what was trained.
    model, tokenizer = load_trained(result.model_directory)
    assert tokenizer is None
    tokens = torch.arange(32).view(1, 32)
    assert torch.equal(model(tokens).logits, result.model(tokens).logits)
    shown = capsys.readouterr().err
    assert "14 modules with 73,728 weights converted to bitnet 6:8" in shown


def test_a_finished_run_is_reused(recipe, capsys):
    first = train(recipe())
    before = (first.directory / "metrics.jsonl").stat().st_mtime_ns
    (first.model_directory / "notes").mkdir()  # of somebody
    second = train(recipe())
    assert second.reused
    assert second.model is None
    for name in ("loss", "validation_loss", "steps", "seconds", "model_directory", "checkpoint"):
        assert getattr(second, name) == getattr(first, name)
    assert (first.directory / "metrics.jsonl").stat().st_mtime_ns == before
    assert "is finished: 12 steps; reusing it" in capsys.readouterr().err
    (first.directory / "result.json").unlink()  # it would be written again, and the model with it
    with pytest.raises(ConfigError, match="model holds notes, which would be lost"):
        train(recipe())


def test_another_configuration_is_refused(recipe):
    train(recipe())
    with pytest.raises(ConfigError) as caught:
        train(recipe(optimizer={"learning_rate": 1e-4}, sparsity={"pattern": "4:8"}))
    assert "holds another run: sparsity.pattern is '6:8' there and '4:8' here; " in str(
        caught.value
    )
    assert "optimizer.learning_rate is 0.003 there and 0.0001 here" in str(caught.value)


def test_a_run_that_came_to_nothing_gives_way(recipe):
    with pytest.raises(PatternError, match="not a multiple of M = 7"):
        train(recipe(sparsity={"pattern": "3:7"}))
    result = train(recipe(schedule={"steps": 2}))
    assert load_recipe(result.directory / "config.yaml").sparsity.pattern == "6:8"


def test_a_model_that_no_run_wrote_is_not_replaced(recipe):
    config = recipe()
    directory = Path(config.run.directory)
    precious = directory / "model" / "model.safetensors"
    precious.parent.mkdir(parents=True)
    precious.write_text("a month of training")
    with pytest.raises(ConfigError, match="model exists and is not a trained model; give a new"):
        train(config)
    (directory / "model" / "sparse_bitnet.json").write_text("{}")  # trained, somewhere else
    with pytest.raises(ConfigError, match=r"was not written by a run in .* and would be replaced"):
        train(config)
    assert precious.read_text() == "a month of training"
    assert sorted(path.name for path in directory.iterdir()) == [".lock", "model"]
    assert train(recipe(run={"export": False})).model_directory is None


def test_a_later_pattern_is_checked_at_once(recipe):
    steps = []
    config = recipe(sparsity={"until": {0.3: "dense", 0.6: "3:7"}})
    with pytest.raises(PatternError, match=r"layers\.0\.self_attn\.q_proj.* M = 7 of pattern 3:7"):
        train(config, lambda done, model: steps.append(done))
    assert not steps


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"config_digest": 1}', "\udcff"])
def test_a_damaged_result_is_made_again(recipe, damage):
    first = train(recipe(run={"checkpoint_every": 100}, schedule={"steps": 2}))
    path = first.directory / "result.json"
    good = path.read_text()
    path.write_text(damage, errors="surrogateescape")
    second = train(recipe(run={"checkpoint_every": 100}, schedule={"steps": 2}))
    assert not second.reused
    assert second.loss == first.loss
    assert json.loads(path.read_text())["config_digest"] == json.loads(good)["config_digest"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("damage", "gone"),
    [
        (Path.unlink, "13 of 13 rows"),
        (lambda path: path.write_text(""), "13 of 13 rows"),
        (lambda path: path.write_bytes(b"\0" * 3000), "13 of 13 rows"),  # after a power cut
        (cut, "2 of 13 rows"),
    ],
    ids=["missing", "empty", "zeros", "cut"],
)
def test_a_run_without_its_metrics_ends_with_its_weights(recipe, damage, gone, capsys):
    config = recipe(run={"checkpoint_every": 6})
    first = train(config)
    shutil.rmtree(first.model_directory)
    (first.directory / "result.json").unlink()
    damage(first.history)
    capsys.readouterr()
    second = train(config)
    shown = capsys.readouterr().err
    assert f"{gone} of metrics.jsonl are gone" in shown
    assert "the last row of metrics.jsonl is gone, and the last training loss with it" in shown
    assert second.loss is None
    assert second.validation_loss == first.validation_loss  # measured again
    assert rows(second)[-1] == {"step": 12, "validation_loss": first.validation_loss}
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "loss" not in str(second).split()
    assert train(config).reused  # and the result is a result like any other


def test_rows_in_the_middle_that_are_gone_are_counted(recipe, capsys):
    config = recipe(run={"checkpoint_every": 5})
    with pytest.raises(TrainingInterruptedError):
        train(config, stop_at(5))
    history = Path(config.run.directory) / "metrics.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    history.write_text("".join([*lines[:2], "damaged\n", *lines[3:]]))
    result = train(config)
    assert "1 of 5 rows of metrics.jsonl are gone" in capsys.readouterr().err
    assert result.loss == losses(result)[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a descriptor is")
def test_rows_are_synced_before_a_checkpoint(recipe, monkeypatch):
    synced = []
    fsync = os.fsync

    def logged(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "metrics.jsonl":
            text = Path(f"/proc/self/fd/{descriptor}").read_text()
            synced.append(json.loads(text.splitlines()[-1])["step"])
        fsync(descriptor)

    monkeypatch.setattr("sparse_bitnet.train.monitor.os.fsync", logged)
    train(recipe(run={"checkpoint_every": 4}))
    assert synced == [4, 8, 12, 12]


def test_checkpoints_come_at_their_steps_and_the_last_stay(recipe):
    result = train(recipe(run={"checkpoint_every": 5, "keep": 2}))
    found = sorted(path.name for path in (result.directory / "checkpoints").iterdir())
    assert found == ["step-00000010", "step-00000012"]
    assert result.checkpoint.name == "step-00000012"


def test_a_crash_before_the_export_is_made_good(recipe, monkeypatch):
    config = recipe(run={"checkpoint_every": 100})

    def crash(*_args):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sparse_bitnet.train.loop.save_trained", crash)
        with pytest.raises(OSError, match="no space"):
            train(config)
    result = train(config)  # nothing left to train: it reads the last step, and exports
    assert not result.reused
    assert result.loss == losses(result)[-1]
    assert len(losses(result)) == 12
    assert result.model_directory.is_dir()


@pytest.fixture
def first_gradient(recipe, monkeypatch):
    """``first_gradient("name", **sections)``: the gradient of a run's first step, one vector."""

    def gradient(name, **sections):
        seen = []

        def clip(parameters, limit):
            seen.append(torch.cat([p.grad.double().flatten() for p in parameters]))
            return clip_gradients(parameters, limit)

        monkeypatch.setattr("sparse_bitnet.train.loop.clip_gradients", clip)
        train(recipe(name, schedule={"steps": 1}, **sections))
        (vector,) = seen
        return vector

    return gradient


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 1e-5), ("bitnet", 1e-2)])
def test_accumulation_sums_the_same_gradient(first_gradient, kind, bound):
    """One batch, whole or in four parts, gives one gradient; later steps amplify its last bits.

    In float32 a sum of 256 tokens in another order is off by 2⁻²⁴ a few times over. Of a ternary
    model an activation whose last bit changes may round to the next of 127 integers as well.
    """
    sections = {"sparsity": {"kind": kind}}
    whole = first_gradient("whole", **sections)
    parts = first_gradient("parts", **sections, data={"micro_batch_size": 2})
    assert (parts - whole).norm() < bound * whole.norm()


def test_seeds_are_other_runs(recipe):
    one = train(recipe("one", schedule={"steps": 2}))
    same = train(recipe("same", schedule={"steps": 2}))
    other = train(recipe("other", schedule={"steps": 2}, run={"seed": 1}))
    assert losses(one) == losses(same)
    assert losses(one) != losses(other)


def test_the_baseline_learns_better_at_first(recipe):
    ternary = train(recipe("ternary", schedule={"steps": 40}))
    sections = {"schedule": {"steps": 40}, "sparsity": {"kind": "bf16"}}
    baseline = train(recipe("baseline", **sections))
    assert baseline.loss < ternary.loss
    assert rows(baseline)[-2]["weight_decay"] == 0.1
    assert rows(ternary)[-2]["weight_decay"] == 0.0


def test_bf16_autocast(recipe):
    exact = train(recipe("fp32", schedule={"steps": 4}))
    rounded = train(recipe("bf16", schedule={"steps": 4}, run={"precision": "bf16"}))
    assert losses(rounded) != losses(exact)
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.01)
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())


def test_dense_checkpoint_to_sparse(recipe, tmp_path):
    dense = preset_model(0)
    dense.save_pretrained(tmp_path / "dense")
    config = recipe(
        model={"source": str(tmp_path / "dense")},
        sparsity={"pattern": "2:4", "rules": {r"layers\.0\..*q_proj": "skip"}},
        schedule={"steps": 1, "warmup": 0},
        optimizer={"learning_rate": 1e-8, "weight_decay": 0.0},
    )
    result = train(config)
    weights = {weight.name: weight for weight in master_weights(result.model)}
    assert len(weights) == 13
    for name, p in dense.named_parameters():
        torch.testing.assert_close(result.model.get_parameter(name), p, atol=1e-6, rtol=0)
    assert all(str(weight.pattern) == "2:4" for weight in weights.values())


def test_losses_that_are_not_finite_stop_the_run(recipe):
    config = recipe(run={"log_every": 100, "checkpoint_every": 4, "export": False})

    def poison(done, model):
        if done == 6:
            with torch.no_grad():
                model.model.norm.weight.fill_(math.nan)

    with pytest.raises(TrainingError) as caught:
        train(config, poison)
    good = Path(config.run.directory) / "checkpoints" / "step-00000004"
    assert str(caught.value) == (
        f"loss or gradient is not finite at step 7; the last good checkpoint is {good}. Try a "
        "lower optimizer.learning_rate or a longer schedule.warmup"
    )
    assert [path.name for path in good.parent.iterdir()] == ["step-00000004"]
    # From that checkpoint the run goes on as if nothing had happened.
    assert train(config).loss == train(recipe("clean", run={"log_every": 100})).loss


def test_not_finite_without_a_checkpoint(recipe):
    def poison(_done, model):
        with torch.no_grad():
            model.model.norm.weight.fill_(math.inf)

    with pytest.raises(TrainingError, match=r"not finite at step 2; there is no checkpoint yet"):
        train(recipe(), poison)


def test_validation_happens_when_asked(recipe, tokens):
    result = train(recipe(run={"validate_every": 5, "log_every": 100}))
    validations = [row["step"] for row in rows(result) if "validation_loss" in row]
    assert validations == [5, 10, 12]
    without = train(recipe("without", run={"validation_sequences": 0}))
    assert without.validation_loss is None
    assert without.perplexity is None


def test_data_errors(recipe, tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        train(recipe("missing", data={"path": str(tmp_path / "nowhere")}))
    with pytest.raises(ConfigError, match="has 16 embedding rows, but the data's tokenizer needs"):
        train(recipe("small", model={"vocab_size": 16}))


def test_a_window_longer_than_the_model(recipe, tmp_path):
    """Conversations have no smallest number of tokens that would tell, only memory runs out."""
    shape = preset_config("tiny", 300)
    shape.max_position_embeddings = 16
    shape.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"sequence_length is 32, .* reads 16 tokens at once"):
        train(recipe(model={"source": str(tmp_path / "config.json")}))


def test_mixture(recipe, tokens):
    values = recipe.values("mixture", schedule={"steps": 2})
    values["data"] |= {"path": "", "mixture": {str(tokens): 2.0}}
    one = train(config_from_dict(values, "test"))
    assert losses(one) == losses(train(recipe("single", schedule={"steps": 2})))


def test_tensorboard_events(recipe):
    pytest.importorskip("tensorboard")
    result = train(recipe(run={"tensorboard": True}, schedule={"steps": 2}))
    assert list((result.directory / "tensorboard").glob("events.*"))


def test_cuda_without_cuda(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"run\.device is cuda, but PyTorch finds no CUDA"):
        train(recipe(run={"device": "cuda"}))


def test_the_verb(recipe, tmp_path, capsys):
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.values()))
    printed = str(train_command([str(path), "--schedule.steps", "2"]))
    assert "steps       2 (512 tokens)" in printed
    assert "perplexity" in printed
    assert f"model       {tmp_path / 'run' / 'model'}" in printed
    assert "--schedule.steps INT" in str(train_command(["--help"]))
    with pytest.raises(ConfigError, match="the recipe comes first"):
        train_command([])
    with pytest.raises(SystemExit):
        train_command([str(path), "--schedule.step", "2"])
    assert "Unrecognized options: --schedule.step" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_blocks_train_the_same(recipe, first_gradient):
    """And one compilation serves every pattern and every block."""
    from torch._dynamo.utils import counters

    exact, compiled = first_gradient("eager"), first_gradient("compiled", run={"compile": "on"})
    assert (compiled - exact).norm() < 1e-2 * exact.norm()  # an integer of 127 here and there
    frames = counters["frames"]["ok"]
    sparsity = {"pattern": "2:4", "until": {0.5: "dense"}}
    train(recipe("other", schedule={"steps": 3}, run={"compile": "on"}, sparsity=sparsity))
    assert counters["frames"]["ok"] == frames
    assert not counters["graph_break"]


def test_quantization_comes_in_gradually(recipe, tmp_path):
    sparsity = {"quantization": {"until": 0.5}, "until": {0.25: "dense"}}
    result = train(recipe("whole", sparsity=sparsity))
    assert [row["quantization"] for row in rows(result) if "loss" in row] == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, *[1] * 7]
    )
    assert [row["pattern"] for row in rows(result) if "loss" in row] == ["dense"] * 3 + ["6:8"] * 9
    model, _ = load_trained(result.model_directory)
    tokens = torch.arange(32).view(1, 32)
    assert torch.equal(model(tokens).logits, result.model(tokens).logits)


def test_layers_become_ternary_one_after_the_other(recipe):
    quantization = {"until": 0.25, "begin": {"layers.1.": 0.5}}
    result = train(recipe("run", sparsity={"quantization": quantization}))
    parts = [
        (row["quantization"], row["quantization_by_rule"]["layers.1."])
        for row in rows(result)
        if "loss" in row
    ]
    assert parts == ([(1 / 3, 0), (2 / 3, 0), *[(1, 0)] * 4, (1, 1 / 3), (1, 2 / 3), *[(1, 1)] * 4])


def test_a_pretrained_start_survives_only_gradual_quantization(recipe):
    dense = train(recipe("dense", sparsity={"kind": "bf16", "pattern": "dense"}))
    source = {"source": str(dense.model_directory)}
    first = {}
    for name, until in (("at once", 0.0), ("gradual", 1.0)):
        sparsity = {"quantization": {"until": until}}
        first[name] = losses(train(recipe(name, model=source, sparsity=sparsity)))[0]
    assert first["gradual"] < first["at once"]
    assert first["gradual"] == pytest.approx(dense.validation_loss, abs=0.2)
