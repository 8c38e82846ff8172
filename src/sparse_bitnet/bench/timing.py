"""Fair timing: candidates take turns, so that clocks, temperature and neighbours hit all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

Calls = Sequence[Callable[[], object]]
MOST_REPLAYS = 16
TURN_MICROSECONDS = 20_000.0
WHOLE_PASS = 500.0
"""Microseconds from which on a graph takes longer than its launch by the host, so that launches of
several hide behind their work; shorter ones hold many calls instead."""


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
    Passes of few milliseconds are replayed several times a turn, as tokens are generated one after
    another: otherwise the host's launch of the first would be in the time.
    """
    if not torch.cuda.is_available():
        return _on_cpu(candidates, repeats)
    graphs = {name: capture(calls, rounds) for name, calls in candidates.items()}
    shortest = min(replay_microseconds(graph, 1) for graph in graphs.values())
    replays = 1
    if shortest >= WHOLE_PASS:
        replays = min(MOST_REPLAYS, max(1, round(TURN_MICROSECONDS / shortest)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, graph in graphs.items():
            count = replays * rounds * len(candidates[name])
            times[name].append(replay_microseconds(graph, replays) / count)
    return times


def replay_microseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Of all replays together, one after another."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


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
