"""The rows of a training's ``metrics.jsonl``; runs that are stopped on the way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

TIMES = {"tokens_per_second", "seconds"}


def rows(run: Any) -> list[dict[str, Any]]:
    """Of a result, or of a run's directory."""
    path = Path(getattr(run, "directory", run)) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(run: Any) -> list[dict[str, Any]]:
    """Rows that two equal runs share."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run)]


def series(run: Any, name: str) -> list[float]:
    return [row[name] for row in rows(run) if name in row]


def assert_close(
    ours: Sequence[dict[str, Any]],
    theirs: Sequence[dict[str, Any]],
    only: Sequence[str] = (),
    tolerance: float = 1e-5,
) -> None:
    """Every figure of two runs' rows, or those that are named, differs by no more than that."""
    for a, b in zip(ours, theirs, strict=True):
        assert only or a.keys() == b.keys()
        for key in only or a.keys() - {"layers"}:
            assert a.get(key) == pytest.approx(b.get(key), abs=tolerance), (a["step"], key)


def stop_at(step: int, number: int = signal.SIGTERM) -> Callable[[int, Any], None]:
    """For ``train``: a signal to this process after that step."""

    def on_step(done: int, _model: object) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    return on_step
