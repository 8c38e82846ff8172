"""Checkpoints: complete or absent, checked when read, nothing unpickled."""

import errno
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_bitnet.core import CheckpointError, OutputError
from sparse_bitnet.train import checkpoint as module
from sparse_bitnet.train.checkpoint import MANIFEST, Checkpoints
from sparse_bitnet.train.config import OptimizerConfig
from sparse_bitnet.train.model import convert_model
from sparse_bitnet.train.optim import build_optimizer
from sparse_bitnet.train.parallel import Ranks
from tiny_models import preset_model

ALONE = Ranks(0, 1, torch.device("cpu"))
IDS = torch.arange(16).view(2, 8)


class Setup:
    """A model that has learned a little, and its checkpoints."""

    def __init__(self, directory, config, seed=0):
        self.model = preset_model(seed, 32)
        convert_model(self.model, config.sparsity)
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.files = Checkpoints(directory, 2, config, {"tokens": [1]}, ALONE)

    def learn(self):
        self.model(IDS, labels=IDS).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step):
        return self.files.save(step, self.model, self.optimizer)

    def load(self, step):
        self.files.load(step, self.model, self.optimizer)


@pytest.fixture
def setup(tmp_path, recipe):
    return Setup(tmp_path / "checkpoints", recipe())


def weights_file(path):
    return next(path.glob("*.safetensors"))


def test_round_trip_restores_every_bit(setup, tmp_path, recipe):
    for _ in range(3):
        setup.learn()
    setup.save(3)
    other = Setup(tmp_path / "checkpoints", recipe(), seed=1)
    other.load(3)
    assert other.files.latest() == 3
    for _ in range(2):
        setup.learn()
        other.learn()
    for p, q in zip(setup.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(setup.optimizer.state[p][name], other.optimizer.state[q][name])


def test_only_safetensors_and_json_are_written(setup):
    path = setup.save(1)
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".safetensors"]


def test_nothing_is_unpickled(setup, monkeypatch):
    path = setup.save(1)

    def refuse(*_args, **_kwargs):
        raise AssertionError("a checkpoint was unpickled")

    # What DCP's own reader would open first; here it is a stranger's file of no interest.
    (path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    setup.load(1)


def test_the_last_ones_stay(setup):
    assert setup.files.latest() is None
    for step in (5, 10, 15, 20):
        setup.save(step)
    assert setup.files.steps() == [20, 15]
    assert sorted(p.name for p in setup.files.directory.iterdir()) == [
        "step-00000015",
        "step-00000020",
    ]


def test_saving_a_step_again_replaces_it(setup):
    setup.save(5)
    setup.learn()
    path = setup.save(5)
    setup.load(5)
    assert setup.files.steps() == [5]
    assert [p.name for p in path.parent.iterdir()] == ["step-00000005"]


def test_unfinished_ones_are_not_found(setup):
    good = setup.save(5)
    shutil.copytree(good, good.with_name("step-00000010.123.partial"))
    without_manifest = good.with_name("step-00000015")
    shutil.copytree(good, without_manifest)
    (without_manifest / MANIFEST).unlink()
    (good.parent / "notes").touch()
    assert setup.files.latest() == 5


def test_a_crash_while_writing_leaves_the_old_ones(setup, monkeypatch):
    setup.save(5)
    setup.save(10)

    def crash(*_args):
        raise RuntimeError("of DCP's own")

    monkeypatch.setattr(module, "write_text", crash)
    with pytest.raises(CheckpointError, match="step-00000015 cannot be written: of DCP's own"):
        setup.save(15)
    assert setup.files.steps() == [10, 5]
    assert len(list(setup.files.directory.iterdir())) == 2


def test_a_full_disk_says_where_the_run_goes_on(setup, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = module.HuggingFaceStorageWriter.write_data
    said = r"step-0000000{} cannot be written: No space left on device; make room, or .* command {}"
    for step, way_out in ((5, "begins anew"), (7, r"goes on from .*step-00000006")):
        monkeypatch.setattr(module.HuggingFaceStorageWriter, "write_data", full)
        with pytest.raises(OutputError, match=said.format(step, way_out)):
            setup.save(step)
        monkeypatch.setattr(module.HuggingFaceStorageWriter, "write_data", write)
        assert len(list(setup.files.directory.iterdir())) == len(setup.files.steps())
        setup.save(step + 1)
    assert setup.files.steps() == [8, 6]


class Second(Ranks):
    """Another rank than the one that makes the directory."""

    def from_main(self, _value):
        return str(Path.cwd() / "runs" / "step-00000005.1.partial")


def test_every_rank_says_so_in_our_words(tmp_path, recipe, monkeypatch):
    """Where the directory is relative, too, of which they write the absolute one."""
    monkeypatch.chdir(tmp_path)
    files = Setup(Path("runs"), recipe())
    files.files = replace(files.files, ranks=Second(1, 2, torch.device("cpu")))

    def refused(*_args, storage_writer, **_options):
        raise PermissionError(errno.EACCES, "Permission denied", f"{storage_writer.path}/shard")

    monkeypatch.setattr(module.dcp, "save", refused)
    with pytest.raises(OutputError, match=r"step-00000005 cannot be written: .*begins anew"):
        files.save(5)


def damage_truncate(path):
    file = weights_file(path)
    file.write_bytes(file.read_bytes()[:-7])


def damage_flip(path):
    data = bytearray(weights_file(path).read_bytes())
    data[-5] ^= 1
    weights_file(path).write_bytes(data)


def damage_remove(path):
    weights_file(path).unlink()


def damage_manifest(path):
    (path / MANIFEST).write_text("{")


def damage_step(path):
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"step": 1}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_truncate, r"is damaged: shard-.* has \d+ bytes and checksum \d+, expected \[\d+"),
        (damage_flip, r"is damaged: shard-.* checksum"),
        (damage_remove, r"is damaged: 'shard-.*' is missing"),
        (damage_manifest, r"checkpoint\.json is not that of a checkpoint of step 10"),
        (damage_step, r"checkpoint\.json is not that of a checkpoint of step 10"),
    ],
)
def test_damage_is_named_and_the_way_out(setup, damage, reason):
    good, bad = setup.save(5), setup.save(10)
    damage(bad)
    with pytest.raises(CheckpointError, match=reason) as caught:
        setup.load(10)
    assert f"remove it to resume at {good}" in str(caught.value)
    shutil.rmtree(good)
    with pytest.raises(CheckpointError, match="remove it to start over"):
        setup.load(10)


def test_other_runs_are_refused(setup, tmp_path, recipe):
    setup.save(5)
    other = Setup(tmp_path / "checkpoints", recipe(optimizer={"learning_rate": 1.0}))
    with pytest.raises(
        CheckpointError,
        match=r"belongs to another run: optimizer\.learning_rate is 0\.003 there and 1\.0 here",
    ):
        other.load(5)
    same = Setup(tmp_path / "checkpoints", recipe(run={"log_every": 7}))
    same.load(5)
    moved = Checkpoints(same.files.directory, 2, same.files.config, {"tokens": [2]}, ALONE)
    with pytest.raises(CheckpointError, match="the data has changed"):
        moved.load(5, same.model, same.optimizer)


def test_foreign_configurations_and_models(setup):
    path = setup.save(5)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"config": {"speed": "high"}}))
    with pytest.raises(CheckpointError, match=r"is foreign: .*speed is unknown"):
        setup.load(5)
    (path / MANIFEST).write_text(json.dumps(manifest))
    wider = preset_model(0, 32, hidden_size=128)
    optimizer = build_optimizer(wider, OptimizerConfig())
    with pytest.raises(CheckpointError, match="does not fit this model"):
        setup.files.load(5, wider, optimizer)
