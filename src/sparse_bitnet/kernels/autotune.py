"""What was fastest, measured once a shape on the user's own GPU and remembered on disk.

The file is JSON under ``$SPARSE_BITNET_CACHE`` (else ``$XDG_CACHE_HOME/sparse_bitnet``, else
``~/.cache/sparse_bitnet``), one for each device name and software version. A file that cannot be
read or written costs a new measurement and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from sparse_bitnet import files

FORMAT = 3
REPEATS = 5
GRAPH_CALLS = 4
SHORTEST_MICROSECONDS = 0.1
SETTLE_SECONDS = 0.2
"""Of work before anything of many tokens is timed: it is the sustained clock that counts."""
FINALISTS = 3


def bucket(tokens: int) -> int:
    """Token counts that share one measurement: exact up to 4, else the next power of two."""
    return tokens if tokens <= 4 else 1 << (tokens - 1).bit_length()


def cache_file(device: torch.device) -> Path:
    """Where the measurements of a device are kept."""
    parts = [torch.cuda.get_device_name(device), f"torch-{torch.__version__}", f"v{FORMAT}"]
    return files.cache_folder() / (re.sub(r"[^\w.+-]+", "-", "_".join(parts)) + ".json")


class Memory:
    """Measurements of one device: key → {candidate: microseconds}."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries = self._read()

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            entries = json.loads(self._path.read_text(encoding="utf-8")) if self._path else {}
        except (OSError, ValueError):
            return {}
        if not isinstance(entries, dict):
            return {}
        return {key: _sorted(times) for key, times in entries.items() if _valid(times)}

    def get(self, key: str) -> dict[str, float] | None:
        """The times remembered for a key, fastest first."""
        return self._entries.get(key)

    def put(self, key: str, times: dict[str, float]) -> None:
        """Remember times, on disk too if that can be written."""
        self._entries[key] = _sorted(times)
        if self._path is None:
            return
        merged = self._read() | self._entries  # another process may have measured meanwhile
        try:
            files.write_text(self._path, json.dumps(merged, indent=0, sort_keys=True))
        except OSError:
            self._path = None

    def keys(self) -> list[str]:
        return sorted(self._entries)


def _sorted(times: dict[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: item[1]))


def _valid(times: object) -> bool:
    return (
        isinstance(times, dict)
        and bool(times)
        and all(isinstance(t, int | float) and t > 0 for t in times.values())
    )


@cache
def memory(device_index: int) -> Memory:
    """The memory of a CUDA device."""
    return Memory(cache_file(torch.device("cuda", device_index)))


def remembered(tensor: torch.Tensor, key: str, names: Sequence[str]) -> str:
    """The fastest of ``names`` on the tensor's device as far as remembered, else the first."""
    times = memory(tensor.device.index).get(key) if tensor.is_cuda else None
    if times:
        for name in times:  # fastest first
            if name in names:
                return name
    return names[0]


def fastest(times: dict[str, float]) -> str:
    return min(times, key=lambda name: times[name])


def may_measure() -> bool:
    """False while a CUDA graph is being captured, when nothing may be timed."""
    return not torch.cuda.is_current_stream_capturing()


def may_measure_now() -> bool:
    """Whether a shape met for the first time may be measured now."""
    return os.environ.get("SPARSE_BITNET_MEASURE", "1") != "0" and may_measure()


def under_load(
    calls: Mapping[str, Sequence[Callable[[], object]]], times: dict[str, float]
) -> dict[str, float]:
    """The fastest few of ``times`` again, each after some time of its own work.

    Ways to compute one product differ in the energy that they take, so the fastest of a few cool
    repeats need not be the fastest when the GPU has come to its power limit: by up to an eighth on
    an H200.
    """
    best = sorted(times, key=lambda name: times[name])[:FINALISTS]
    return {name: microseconds(calls[name], SETTLE_SECONDS) for name in best}


def microseconds(calls: Sequence[Callable[[], object]], settle: float = 0.0) -> float:
    """Median device time of one call, host time left out by replaying a CUDA graph.

    Args:
        calls: the same work on different memory, so that a cache does not hold all of it.
        settle: seconds of the same work before the timing. Under load a GPU lowers its clock to
            keep its power limit, for sparse products more than for dense ones.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    rounds = max(1, GRAPH_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    until = time.monotonic() + settle
    while time.monotonic() < until:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return max(statistics.median(times), SHORTEST_MICROSECONDS)
