"""Fair timing: candidates take turns, so that clocks, temperature and neighbours hit all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

Calls = Sequence[Callable[[], object]]


def capture(calls: Calls, rounds: int = 1) -> torch.cuda.CUDAGraph:
    """Warm up, then put every call ``rounds`` times into one CUDA graph."""
    for _ in range(2):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return graph


def interleaved(
    candidates: Mapping[str, Calls], repeats: int = 9, rounds: int = 1
) -> dict[str, list[float]]:
    """Microseconds of one call of every candidate, all repeats.

    On CUDA each candidate is a graph of its calls (the same work on different memory, where caches
    would hold it), replayed in turn with the others; without a GPU the calls themselves take turns.
    """
    if not torch.cuda.is_available():
        return _on_cpu(candidates, repeats)
    graphs = {name: capture(calls, rounds) for name, calls in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            count = rounds * len(candidates[name])
            times[name].append(start.elapsed_time(end) * 1e3 / count)
    return times


def _on_cpu(candidates: Mapping[str, Calls], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for calls in candidates.values():
        for call in calls:
            call()
    for _ in range(repeats):
        for name, calls in candidates.items():
            start = time.perf_counter()
            for call in calls:
                call()
            times[name].append((time.perf_counter() - start) * 1e6 / len(calls))
    return times
