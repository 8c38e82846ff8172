"""What the GPU benchmarks share: fair timing, the environment, one table and one JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from decoders import interleaved
from machine import measured_on
from sparse_bitnet import console, files

__all__ = ["FEWEST_CALLS", "copies_beyond_cache", "interleaved", "report", "summary", "write"]

RESULTS = Path(__file__).parent / "results"
FEWEST_CALLS = 24  # of a kernel, in one CUDA graph


def copies_beyond_cache(smallest_bytes: int) -> int:
    """How many copies of the smallest operand overflow the L2 cache twice, at most 24."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(24, max(1, -(-2 * cache // max(1, smallest_bytes))))


def report(name: str, rows: list[dict[str, Any]], out: Path | None = None) -> Path:
    """Write rows and environment to ``results/<gpu>/<name>.json``; returns the path."""
    path = write(name, rows, out)
    console.say(f"wrote {path}")
    return path


def write(name: str, rows: list[dict[str, Any]], out: Path | None = None) -> Path:
    """The same without a word, for a file that grows; ``results/cpu`` where there is no GPU."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    path = (out or RESULTS / device.lower().replace(" ", "-")) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": measured_on(), "rows": rows}, indent=1)
    files.write_text(path, text + "\n")
    return path


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all repeats, microseconds."""
    return {
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
        "all": [round(t, 3) for t in times],
    }
