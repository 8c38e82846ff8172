"""The rows of a training's ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
