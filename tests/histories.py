"""The rows of a training's ``metrics.jsonl``; runs that are stopped on the way."""

import json
import os
import signal
from pathlib import Path

import pytest

TIMES = {"tokens_per_second", "seconds"}


def rows(run):
    """Of a result, or of a run's directory."""
    path = Path(getattr(run, "directory", run)) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(run):
    """Rows that two equal runs share."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run)]


def series(run, name):
    return [row[name] for row in rows(run) if name in row]


def assert_close(ours, theirs, only=(), tolerance=1e-05):
    """Every figure of two runs' rows, or those that are named, differs by no more than that."""
    for a, b in zip(ours, theirs, strict=True):
        assert only or a.keys() == b.keys()
        for key in only or a.keys() - {"layers"}:
            assert a.get(key) == pytest.approx(b.get(key), abs=tolerance), (a["step"], key)


def stop_at(step, number=signal.SIGTERM):
    """For ``train``: a signal to this process after that step."""

    def on_step(done, _model):
        if done == step:
            os.kill(os.getpid(), number)

    return on_step
