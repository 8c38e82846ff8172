"""Two processes with FSDP2 over gloo train what one trains."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from histories import assert_close, stop_at, timeless
from processes import train_on_ranks
from sparse_bitnet.core import ConfigError
from sparse_bitnet.train import TrainingInterruptedError, load_trained, train
from sparse_bitnet.train.checkpoint import MANIFEST
from sparse_bitnet.train.parallel import Ranks, blocks, ranks
from sparse_bitnet.train.recipe import config_from_dict
from tiny_models import preset_model

WORKER = Path(__file__).parents[1] / "training_worker.py"


def written(values, directory):
    path = directory / f"{Path(values['run']['directory']).name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(values, directory, *mode):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    recipe = str(written(values, directory))
    return [*launcher, "--nproc-per-node=2", str(WORKER), recipe, *mode]


def torchrun(values, directory):
    done = subprocess.run(
        command(values, directory),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def two(recipes_in, tmp_path_factory):
    """The configuration of a finished run of two processes."""
    directory = tmp_path_factory.mktemp("parallel")
    values = recipes_in(directory).values(
        "two",
        sparsity={"pattern": "6:8", "until": {0.2: "dense"}},
        run={"checkpoint_every": 6, "keep": 3},
        # Each of two ranks takes four sequences; one process takes two times four.
        data={"micro_batch_size": 4},
    )
    train_on_ranks(written(values, directory), 2)
    return values


def as_one(values, name):
    directory = Path(values["run"]["directory"]).with_name(name)
    return values | {"run": values["run"] | {"directory": str(directory)}}


def begin_at(step, whole, directory):
    """Give a run that has not begun the checkpoint of another; returns that one."""
    source = whole / "checkpoints" / f"step-{step:08d}"
    return Path(shutil.copytree(source, directory / "checkpoints" / source.name))


def test_two_processes_equal_one(two):
    """Losses, norms, flip rates, zeros: within 1e-5, in fact to the last bit.

    γ and the gradient's norm are summed in float64, and each rank's gradient is one micro-batch's,
    so nothing depends on how the weights are cut.
    """
    one = train(config_from_dict(as_one(two, "one"), "test"))
    ours = timeless(two["run"]["directory"])
    assert len(ours) == 13
    assert_close(ours, timeless(one))
    # The exported models are the same too, and load like any other.
    model, _ = load_trained(Path(two["run"]["directory"]) / "model")
    for p, q in zip(model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_two_processes_on_conversations(recipes_in, chats, tmp_path):
    """Ranks have other numbers of answers, and the mean is over all of them."""
    data = {"path": str(chats), "micro_batch_size": 4}
    values = recipes_in(tmp_path).values("two", data=data, schedule={"steps": 4})
    train_on_ranks(written(values, tmp_path), 2)
    one = train(config_from_dict(as_one(values, "one"), "test"))
    figures = ("loss", "gradient_norm", "validation_loss")
    assert_close(timeless(values["run"]["directory"]), timeless(one), figures)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    preset_model(7).save_pretrained(directory)
    return {"source": str(directory), "temperature": 2.0}


def test_a_teacher_and_gradual_quantization(recipes_in, teacher, tmp_path):
    """Every rank has the whole teacher; λ blends what FSDP2 has gathered.

    A run that is resumed at λ = 1 gathers two bits where the first one gathered float32. Nothing
    depends on how the weights are cut, as above.
    """
    values = recipes_in(tmp_path).values(
        "two",
        teacher=teacher,
        sparsity={"quantization": {"until": 0.7}},
        schedule={"steps": 6},
        run={"checkpoint_every": 4, "keep": 2},
        data={"micro_batch_size": 4},
    )
    train_on_ranks(written(values, tmp_path), 2)
    one = train(config_from_dict(as_one(values, "one"), "test"))
    directory, theirs = Path(values["run"]["directory"]), timeless(one)
    assert len(theirs) == 8
    assert_close(timeless(directory), theirs)
    resumed = as_one(values, "resumed")
    begin_at(4, directory, Path(resumed["run"]["directory"]))
    train_on_ranks(written(resumed, tmp_path), 2)
    late = [row for row in theirs if row["step"] > 4]
    assert late[0]["quantization"] == 1
    assert_close(timeless(resumed["run"]["directory"]), late)


def test_hidden_states_of_a_teacher(recipes_in, teacher, tmp_path):
    """FSDP2's hooks let autograd add a hidden state's three gradients in another order.

    So weights differ by float32 rounding after the first update, which later moves some of them
    across a threshold: only steps before that can be compared.
    """
    values = recipes_in(tmp_path).values(
        "two",
        teacher=teacher | {"hidden_layers": [0, 1]},
        schedule={"steps": 2},
        data={"micro_batch_size": 4},
    )
    train_on_ranks(written(values, tmp_path), 2)
    one = train(config_from_dict(as_one(values, "one"), "test"))
    ours, theirs = timeless(values["run"]["directory"])[:2], timeless(one.directory)[:2]
    assert [row["step"] for row in ours] == [0, 1] and theirs[1]["hidden_loss"] > 0.1
    assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize(("precision", "compiled"), [("fp32", "off"), ("bf16", "on")])
def test_two_gpus_equal_one(recipes_in, tmp_path, precision, compiled):
    """The same over NCCL, up to the order of sums over tokens.

    The first step differs by float32 rounding alone. Later ones round weights and activations to
    integers, which turns such differences into steps; on H200s gradient norms were 0.3 % apart
    after six.
    """
    values = recipes_in(tmp_path).values(
        "two",
        sparsity={"pattern": "6:8", "until": {0.2: "dense"}},
        run={"device": "cuda", "precision": precision, "compile": compiled, "checkpoint_every": 6},
        data={"micro_batch_size": 4},
    )
    torchrun(values, tmp_path)
    one = train(config_from_dict(as_one(values, "one"), "test"))
    ours, theirs = timeless(values["run"]["directory"]), timeless(one.directory)
    assert len(ours) == len(theirs) == 13
    for a, b in zip(ours, theirs, strict=True):
        exact = 1e-4 if a["step"] == 1 else 2e-2
        for key in ("loss", "gradient_norm", "validation_loss"):
            assert a.get(key) == pytest.approx(b.get(key), rel=exact), (a["step"], key)
        for key in ("flip_rate", "zeros_before_mask"):
            assert a.get(key) == pytest.approx(b.get(key), abs=2e-3), (a["step"], key)


RESUMED = ("loss", "flip_rate", "zeros_before_mask", "validation_loss")


def test_two_ranks_then_one(two):
    values, whole = as_one(two, "then-one"), Path(two["run"]["directory"])
    source = begin_at(6, whole, Path(values["run"]["directory"]))
    assert json.loads((source / MANIFEST).read_text())["ranks"] == 2
    assert len(list(source.glob("*.safetensors"))) == 2
    resumed = train(config_from_dict(values, "test"))
    late = [row for row in timeless(whole) if row["step"] > 6]
    assert_close(timeless(resumed), late, RESUMED)


@pytest.mark.slow
def test_two_ranks_then_one_then_four(recipes_in, tmp_path):
    values = recipes_in(tmp_path).values(
        "whole", run={"checkpoint_every": 6, "keep": 3}, data={"micro_batch_size": 2}
    )
    train_on_ranks(written(values, tmp_path), 2)
    whole = Path(values["run"]["directory"])
    cut = as_one(values, "cut")
    begin_at(6, whole, Path(cut["run"]["directory"]))
    with pytest.raises(TrainingInterruptedError):
        train(config_from_dict(cut, "test"), stop_at(9))
    train_on_ranks(written(cut, tmp_path), 4)
    late = [row for row in timeless(whole) if row["step"] > 6]
    assert_close(timeless(cut["run"]["directory"]), late, RESUMED)


@pytest.mark.slow
def test_sigterm_to_torchrun(two, tmp_path):
    """Both ranks agree on the step, save it together, and one process goes on from there."""
    values = as_one(two, "stopped")
    directory = Path(values["run"]["directory"])
    process = subprocess.Popen(
        command(values, tmp_path, "slow"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("after step 3"):
            process.terminate()
            break
    _, shown = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "stopped by SIGTERM after step" in shown
    assert len(list((directory / "checkpoints").iterdir())) == 1
    resumed = train(config_from_dict(values, "test"))
    assert_close(timeless(resumed), timeless(two["run"]["directory"]), ["loss"])


@pytest.mark.slow
def test_two_processes_compiled(two, tmp_path):
    values = as_one(two, "compiled")
    values["run"]["compile"] = "on"
    torchrun(values, tmp_path)
    # Fused kernels round otherwise, and ternary training amplifies that; see test_golden.py.
    ours, theirs = (timeless(one["run"]["directory"]) for one in (values, two))
    assert_close(ours, theirs, ["loss"], 5e-3)


def test_batches_must_divide(recipe, monkeypatch):
    from sparse_bitnet.train.batches import Batches

    monkeypatch.setattr(Ranks, "first_alone", lambda _, read: read())  # these have no group
    third = Ranks(0, 3, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"data\.batch_size is 8: it must be a multiple of the 3"):
        Batches(recipe(), third)
    fourth = Ranks(0, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"it must divide the 6 sequences of each of 2 ranks"):
        Batches(recipe(data={"batch_size": 12, "micro_batch_size": 4}), fourth)


def test_one_process_has_no_group():
    with ranks("cpu") as here:
        assert (here.rank, here.world_size, here.device.type) == (0, 1, "cpu")
        assert not torch.distributed.is_initialized()
        assert here.any(True)
        assert not here.any(False)
        assert here.gather("x") == ["x"]
        assert here.from_main("y") == "y"
        assert here.mean(torch.tensor(2.0)).item() == 2.0


def test_too_many_processes_for_the_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = "local rank 1, but there are 1 CUDA devices"
    with pytest.raises(ConfigError, match=message), ranks("auto"):
        pass


def test_blocks_are_the_decoder_s():
    assert [type(block).__name__ for block in blocks(preset_model(0))] == ["Qwen2DecoderLayer"] * 2
