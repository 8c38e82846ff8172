"""Toy sweeps on CPU: real training, killed and taken up again."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from processes import Started, context
from sparse_bitnet import cli
from sparse_bitnet.console import Task
from sparse_bitnet.core import ConfigError, DataError
from sparse_bitnet.study import pool
from sparse_bitnet.study import run_cell as cell_module
from sparse_bitnet.study import worker as worker_module
from sparse_bitnet.study.cells import read_sweep
from sparse_bitnet.study.report import report
from sparse_bitnet.study.rows import read_rows
from sparse_bitnet.study.run_cell import run_cell
from sparse_bitnet.study.sweep import _jobs, _places, _Sweep, sweep

RECIPE = """
name: test
base:
  data: {{path: {tokens}, sequence_length: 32, batch_size: 8}}
  run: {{checkpoint_every: 6, log_every: 3}}
evaluation: {{validation_tokens: 1000}}
defaults: {{size: tiny, tokens_per_weight: {length}}}
blocks:
  - pattern: [dense, 4:8]
    kind: [bf16, bitnet]
"""
STEPS = 24
WEIGHTS = 2 * (64 * 64 * 3 + 3 * 64 * 128)


def write_recipe(tmp_path: Path, tokens: Path, steps: int = STEPS, more: str = "") -> Path:
    path = tmp_path / "sweep.yaml"
    length = steps * 8 * 32 / WEIGHTS
    path.write_text(RECIPE.format(tokens=tokens, length=length) + more)
    return path


def finished(out: Path) -> int:
    path = out / "rows.jsonl"
    return len(read_rows(path)[0]) if path.is_file() else 0


def unfinished_with_checkpoint(out: Path) -> bool:
    done = {row.key for row in read_rows(out)[0]}
    return any(path.parts[-3] not in done for path in out.glob("cells/*/checkpoints/step-*"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def test_four_cells_killed_and_resumed(
    tmp_path: Path, toy_tokens: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, toy_tokens), tmp_path / "out"
    process = context.Process(target=sweep, args=(recipe, out))
    process.start()
    deadline = time.monotonic() + 120
    try:
        # Killed once a cell is finished and the next has a checkpoint.
        while not (finished(out) and unfinished_with_checkpoint(out)):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert process.pid is not None
        workers = children(process.pid)
    finally:
        process.kill()
        process.join()
    before = (out / "rows.jsonl").read_bytes()
    while any(alive(pid) for pid in workers):  # a worker ends by itself when its sweep is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)

    result = sweep(recipe, out)
    told = capfd.readouterr().err
    assert (result.done, result.failed, result.left) == (4, {}, [])
    assert "4 cells, 1 finished before, 3 to run" in told
    assert (out / "rows.jsonl").read_bytes().startswith(before)
    rows, problems = read_rows(out)
    assert problems == []
    assert [(r.cell.pattern, r.cell.kind) for r in rows] == [
        ("dense", "bf16"),
        ("dense", "bitnet"),
        ("4:8", "bf16"),
        ("4:8", "bitnet"),
    ]
    log = (out / "logs" / "worker-0.log").read_text()
    assert "resuming from" in log
    for row in rows:
        assert row.raw["config"]["schedule"]["steps"] == STEPS
        assert row.raw["weights"] == WEIGHTS
        assert 1 < row.perplexity < 400
        tokens, losses = row.series("loss")
        assert (tokens[-1], len(losses)) == (STEPS * 8 * 32, STEPS // 3)
        assert {one["fraction"] for one in row.raw["polarization"]} == {0.0, 0.1, 0.5, 1.0}
        assert {"python", "torch", "device", "commit"} <= set(row.raw["environment"])
        # What is stored is enough to repeat it.
        assert row.raw["config"]["run"]["seed"] == row.cell.seed
        assert row.raw["data"]["train"]
    assert list((out / "cells").iterdir()) == []

    again = sweep(recipe, out)
    assert again.done == 4
    assert (out / "rows.jsonl").read_bytes().count(b"\n") == 4

    report(out)
    drawn = {path.stem.partition("-tiny")[0] for path in (out / "plots").iterdir()}
    assert {"loss", "mask-cost", "flips", "zeros", "polarization"} <= drawn


@pytest.mark.parametrize("checkpoints", [True, False])
def test_killed_while_a_cell_was_measured(
    tmp_path: Path, toy_tokens: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: bool
) -> None:
    """Trained to its end, its model lost with the process: the next call gives the same row."""
    recipe = write_recipe(tmp_path, toy_tokens, steps=6)
    if not checkpoints:
        recipe.write_text(recipe.read_text().replace("checkpoint_every: 6, ", ""))
    job = _jobs(read_sweep(recipe), tmp_path / "cells")[0]
    Path(job.config.run.directory).mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(cell_module, "_evaluate", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            run_cell(job)
    assert (Path(job.config.run.directory) / "result.json").is_file()
    steps: list[int] = []
    row = run_cell(job, lambda done, _: steps.append(done))
    assert steps == ([] if checkpoints else [1, 2, 3, 4, 5, 6])
    fresh = replace(job.config, run=replace(job.config.run, directory=str(tmp_path / "fresh")))
    (tmp_path / "fresh").mkdir()
    whole = run_cell(replace(job, config=fresh))
    for figure in ("status", "validation", "history", "polarization"):
        assert row[figure] == whole[figure]


def test_at_the_deadline_what_runs_saves_and_leaves(
    tmp_path: Path, toy_tokens: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, toy_tokens, steps=500_000), tmp_path / "out"
    result = sweep(recipe, out, minutes=0.05)
    assert (result.done, len(result.left), result.failed) == (0, 4, {})
    assert "out of time" in capfd.readouterr().err
    assert finished(out) == 0


def test_a_failing_cell_does_not_stop_the_others(
    tmp_path: Path,
    toy_tokens: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What only a worker finds out: there is no GPU for BitNet's CUDA graph.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    graph = "kinds: {bitnet: {run: {cuda_graph: true}}}\n"
    recipe = write_recipe(tmp_path, toy_tokens, steps=2, more=graph)
    out = tmp_path / "out"
    result = sweep(recipe, out, cpu_workers=2, keep_runs=True)
    assert len(result.failed) == 2
    assert result.exit_code == 1
    assert all("needs one process on CUDA" in reason for reason in result.failed.values())
    rows, _ = read_rows(out)
    assert {row.cell.kind for row in rows} == {"bf16"}
    for line in (out / "rows.jsonl").read_text().splitlines():  # plain JSON, not too long
        assert json.loads(line)["status"] == "done"
        assert len(line) < 100_000
    assert len(list((out / "cells").glob("*/model/model.safetensors"))) == 2
    sweep(write_recipe(tmp_path, toy_tokens, steps=3), tmp_path / "out", dry_run=True)
    assert "holds 2 rows of other cells or settings" in capfd.readouterr().err


def test_two_sweeps_in_one_directory(tmp_path: Path, toy_tokens: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another sweep is running in"):
            sweep(write_recipe(tmp_path, toy_tokens), out)


def test_dry_run_lists_and_runs_nothing(
    tmp_path: Path, toy_tokens: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = sweep(write_recipe(tmp_path, toy_tokens), tmp_path / "out", dry_run=True)
    assert (result.done, len(result.left)) == (0, 4)
    assert not (tmp_path / "out").exists()
    told = capfd.readouterr().err
    assert told.count("bitnet 4:8 tiny seed 0") == 1
    assert "0.0061M tokens" in told
    assert "0.025M tokens together; nothing was run" in told


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_by_a_signal_it_saves_and_reports_how_to_go_on(
    tmp_path: Path, toy_tokens: Path, number: signal.Signals
) -> None:
    recipe, out = write_recipe(tmp_path, toy_tokens, steps=400), tmp_path / "out"
    recipe.write_text(recipe.read_text().replace("checkpoint_every: 6, ", ""))
    process = Started(tmp_path, cli.main, (["sweep", str(recipe), str(out)],))
    try:
        deadline = time.monotonic() + 120
        while not any(line.count("\n") > 2 for line in _metrics(out)):
            assert process.is_alive(), process.complained()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.join(60)
    finally:
        process.kill()
        process.join()
    told = process.complained()
    assert process.exitcode == 128 + number
    assert "0 of 4 cells finished, 0 failed, 4 left" in told
    assert f"stopped by {number.name}; the same command goes on" in told
    assert len(list(out.glob("cells/*/checkpoints/step-*"))) == 1


def _metrics(out: Path) -> list[str]:
    return [path.read_text() for path in out.glob("cells/*/metrics.jsonl")]


# Stands for a worker that has trained and measures for a while.
MEASURING = """
import json, sys, time
from multiprocessing.connection import Connection
from sparse_bitnet.study import worker

def run(job, connection, stops):
    connection.send({"done": 1, "steps": 1})
    time.sleep(1)
    return json.load(open(ROW))

worker._run = run
worker.serve(Connection(int(sys.argv[1])))
"""
DYING = "import sys; sys.stdin.read(); open(sys.argv[1]); print('no'); sys.exit(3)"


class Pressed:
    """A request to stop, or Ctrl-C once more, as soon as a worker has said that it trains."""

    def __init__(self, run: _Sweep, again: bool = False) -> None:
        self.run, self.again, self.at = run, again, 0.0

    def __bool__(self) -> bool:
        if any(self.run._steps_done.values()):
            self.at = time.monotonic()
            if self.again:
                raise KeyboardInterrupt
        return self.at > 0


def one_cell(tmp_path: Path, tokens: Path) -> _Sweep:
    jobs = _jobs(read_sweep(write_recipe(tmp_path, tokens)), tmp_path / "cells")[:1]
    return _Sweep(jobs, list(jobs), tmp_path / "rows.jsonl", math.inf, False)


def test_what_is_trained_is_measured_before_a_worker_leaves(
    tmp_path: Path, toy_tokens: Path, monkeypatch: pytest.MonkeyPatch, make_row: Any
) -> None:
    row = json.dumps(make_row(30.0) | {"problem": None, "much": "x" * 2**20})
    (tmp_path / "row.json").write_text(row)
    code = MEASURING.replace("ROW", repr(str(tmp_path / "row.json")))
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, "-c", code))
    run = one_cell(tmp_path, toy_tokens)
    with pool.started([{}], tmp_path / "logs") as workers:
        run.work(workers, Task("", None, None), Pressed(run))
    assert (run.waiting, run.failed, finished(tmp_path)) == ([], {}, 1)


def test_a_second_interrupt_does_not_wait(
    tmp_path: Path, toy_tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = MEASURING.replace("time.sleep(1)", "[time.sleep(1) for _ in range(60)]")
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, "-c", slow))
    run = one_cell(tmp_path, toy_tokens)
    stop = Pressed(run, again=True)
    with pytest.raises(KeyboardInterrupt), pool.started([{}], tmp_path / "logs") as workers:
        run.work(workers, Task("", None, None), stop)
    assert time.monotonic() - stop.at < 5
    assert workers[0].process.returncode == -signal.SIGKILL
    assert len(run.waiting) == 1


def test_a_worker_that_dies_is_a_failure_and_is_replaced(
    tmp_path: Path, toy_tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, "-c", DYING))
    (job,) = one_cell(tmp_path, toy_tokens).waiting
    with pool.started([{}], tmp_path / "logs") as (worker,):
        for _ in range(2):
            worker.process.wait()
            (message,) = worker.run(job)
            assert "worker 0 died with exit code 1; its output is in" in message["failed"]
            assert not worker.busy


def test_a_failure_is_told_where_the_log_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    handler = signal.getsignal(signal.SIGTERM)
    connection = Mock(recv=Mock(side_effect=["job", EOFError]))
    monkeypatch.setattr(worker_module, "_run", full)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=full))
    worker_module.serve(connection)
    signal.signal(signal.SIGTERM, handler)
    connection.send.assert_called_once_with(
        {"failed": "OSError: [Errno 28] No space left on device"}
    )


def test_progress_counts_each_step_once(tmp_path: Path, toy_tokens: Path, make_row: Any) -> None:
    """A cell that is resumed at step 20, one that fails, one that is stopped."""
    jobs = _jobs(read_sweep(write_recipe(tmp_path, toy_tokens)), tmp_path / "cells")
    run = _Sweep(jobs, list(jobs), tmp_path / "rows.jsonl", math.inf, False)
    shown: list[tuple[int, str]] = []
    task = SimpleNamespace(advance=lambda steps, detail: shown.append((steps, detail)))
    workers: Any = 2 * [SimpleNamespace(environment={}, busy=True)]
    run.waiting = jobs[3:]
    row = make_row(30.0) | {"problem": None}
    for job, message in (
        (jobs[0], {"done": 20, "steps": 24}),
        (jobs[0], {"done": 23, "steps": 24}),
        (jobs[0], {"row": row}),
        (jobs[1], {"failed": "no reason"}),
        (jobs[2], {"done": 6, "steps": 24}),
        (jobs[2], {"interrupted": "Ctrl-C"}),
    ):
        run._handle(job, message, workers, task)
    assert [steps for steps, _ in shown] == [20, 3, 1, 24, 6, 0]
    assert shown[-1][1] == "1 of 4 cells, 2 running, 1 failed"
    assert run.waiting == [jobs[2], jobs[3]]
    (written,), _ = read_rows(tmp_path / "rows.jsonl")
    assert written.raw["environment"]["side_by_side"] == 2


def test_workers_get_their_gpu_and_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert _places(1, 3) == [{"OMP_NUM_THREADS": "4"}] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    places = _places(2, 9)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "1", "0", "1"]
    assert {place["OMP_NUM_THREADS"] for place in places} == {"3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [tuple(place.values()) for place in _places(1, 1)] == [("5", "1"), ("7", "1")]


def test_missing_documents_are_found_before_anything_is_trained(
    tmp_path: Path, toy_tokens: Path
) -> None:
    recipe = write_recipe(tmp_path, toy_tokens)
    wanted = "validation_tokens: 1000, cloze_text: 'text:nowhere.txt'"
    recipe.write_text(recipe.read_text().replace("validation_tokens: 1000", wanted))
    with pytest.raises((ConfigError, DataError), match=r"nowhere\.txt"):
        sweep(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[dense, 4:8]", "[dense, 3:5]", "bf16 3:5 tiny .*64 is not a multiple of M = 5"),
        ("kind:", "until: {0.5: 3:5}\n    kind:", "64 is not a multiple of M = 5 of pattern 3:5"),
        ("1000}", "1000, window: 99999}", "window 99999 is out of range"),
    ],
)
def test_what_does_not_fit_the_model_is_found_before_anything_is_trained(
    tmp_path: Path, toy_tokens: Path, old: str, new: str, message: str
) -> None:
    recipe = write_recipe(tmp_path, toy_tokens)
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        sweep(recipe, tmp_path / "out", dry_run=True)
    with pytest.raises(ConfigError, match=message):
        sweep(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_settings(tmp_path: Path, toy_tokens: Path) -> None:
    with pytest.raises(ConfigError, match="--per-gpu is 0; at least 1"):
        sweep(write_recipe(tmp_path, toy_tokens), tmp_path / "out", per_gpu=0)
    for minutes in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"minutes is .*; above 0"):
            sweep(write_recipe(tmp_path, toy_tokens), tmp_path / "out", minutes=minutes)
