"""Killed without warning, or asked to leave: the run goes on as if nothing had happened."""

import re
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

import training_worker
from histories import timeless
from processes import Started
from sparse_bitnet.core import ConfigError
from sparse_bitnet.train import train
from sparse_bitnet.train.recipe import config_from_dict


class Runner:
    """Starts a worker, waits for a line of its, sends it a signal."""

    def __init__(self, recipe, tmp_path):
        self.values = recipe.values("killed", run={"checkpoint_every": 4})
        self.path = tmp_path / "killed.yaml"
        self.path.write_text(yaml.safe_dump(self.values))
        self.directory = Path(self.values["run"]["directory"])

    @contextmanager
    def waiting(self, line, *mode):
        """A worker that has printed the line; killed at the end."""
        process = Started(self.path.parent, training_worker.main, (str(self.path), *mode))
        deadline = time.monotonic() + 120
        try:
            while not any(one.startswith(line) for one in process.printed().splitlines()):
                assert process.is_alive() and time.monotonic() < deadline, process.complained()
                time.sleep(0.02)
            yield process
        finally:
            process.kill()
            process.join()

    def signalled(self, number, line, *mode):
        with self.waiting(line, *mode) as process:
            process.send_signal(number)
            process.join(120)
        return process

    def resume(self):
        return timeless(train(config_from_dict(self.values, "test")).directory)


@pytest.fixture
def runner(recipe, tmp_path):
    return Runner(recipe, tmp_path)


@pytest.fixture
def uninterrupted(recipe):
    return timeless(train(recipe("whole")).directory)


def test_kill_9_in_training(runner, uninterrupted):
    ended = runner.signalled(signal.SIGKILL, "after step 7", "step", "7")
    assert ended.exitcode == -signal.SIGKILL, ended.complained()
    assert len(timeless(runner.directory)) == 7
    assert runner.resume() == uninterrupted


def test_kill_9_while_a_checkpoint_is_written(runner, uninterrupted, capsys):
    ended = runner.signalled(signal.SIGKILL, "writing", "write", "8")
    assert ended.exitcode == -signal.SIGKILL, ended.complained()
    found = sorted(path.name for path in (runner.directory / "checkpoints").iterdir())
    assert found[0] == "step-00000004"
    assert found[1].startswith("step-00000008.")
    assert found[1].endswith(".partial")
    assert runner.resume() == uninterrupted
    shown = capsys.readouterr().err
    assert re.search(r"removed .*step-00000008\.\d+\.partial, which a killed process left", shown)
    assert not list(runner.directory.rglob("*.partial"))
    assert "step-00000004" in shown


def test_a_full_disk(runner, uninterrupted):
    """The earlier checkpoint stays, and the same command goes on from it."""
    ended = Started(runner.path.parent, training_worker.main, (str(runner.path), "full", "6"))
    ended.join(120)
    checkpoints = runner.directory / "checkpoints"
    assert (ended.exitcode, ended.complained().splitlines()[-1]) == (
        1,
        f"{checkpoints}/step-00000008 cannot be written: File too large; choose a place where "
        f"files may be that large. After that the same command goes on from "
        f"{checkpoints}/step-00000004",
    )
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]
    assert runner.resume() == uninterrupted


def test_sigterm_to_a_process(runner, uninterrupted):
    ended = runner.signalled(signal.SIGTERM, "after step 3", "slow")
    told = ended.complained()
    assert ended.exitcode == 128 + signal.SIGTERM, told
    assert "SIGTERM: finishing this step, then saving; again to abort" in told
    assert "stopped by SIGTERM after step " in told
    assert "The same command goes on from there" in told
    assert 3 <= len(timeless(runner.directory)) < 12
    assert runner.resume() == uninterrupted


def test_two_processes_in_one_directory(runner, monkeypatch):
    """The second is refused and disturbs nothing; a killed first one is in nobody's way."""
    monkeypatch.setattr("sparse_bitnet.train.result.PATIENCE", 0.2)
    config = config_from_dict(runner.values, "test")
    with runner.waiting("after step 3", "step", "3") as process:
        before = (runner.directory / "config.yaml").stat().st_mtime_ns
        leftover = runner.directory / f"result.json.{process.pid}.partial"
        leftover.touch()  # nobody holds it: it is no temporary of the living one
        with pytest.raises(ConfigError, match=r"killed: another process is training there; wait"):
            train(config)
        assert leftover.exists()
        assert (runner.directory / "config.yaml").stat().st_mtime_ns == before
        process.kill()
    result = train(config)
    assert result.steps == 12
    assert not leftover.exists()
