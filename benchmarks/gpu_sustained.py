"""Products at the clock that lasts: python benchmarks/gpu_sustained.py

Every dense tile and every algorithm of the sparse library on 7B shapes, 16,384 tokens: microseconds
of the first calls on a cool GPU, and after most of a second of nothing else, with the clock and the
power that it settles at. Products only, without quantization.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_common import write
from sparse_bitnet.bench.timing import capture, replay_microseconds
from sparse_bitnet.core import BackendError, Pattern, row_scale
from sparse_bitnet.kernels import ternarize
from sparse_bitnet.kernels.matmul import cusparselt, triton_dense
from sparse_bitnet.kernels.quantize_activations import quantize_fused
from sparse_bitnet.kernels.weight import prepare

TOKENS = 16384
SHAPES = {"7B gate_up": (37888, 3584), "7B down": (3584, 18944)}
CALLS = 8  # of a graph
SETTLE, REST = 0.7, 0.25  # seconds


def sustained(call: Callable[[], object]) -> dict[str, Any]:
    """Cool and settled microseconds of a call, and what the GPU settled at."""
    graph = capture([call], CALLS)
    torch.cuda.synchronize()
    cool = replay_microseconds(graph, 1) / CALLS
    until = time.monotonic() + SETTLE
    seen: list[tuple[float, float]] = []
    while time.monotonic() < until:
        for _ in range(6):
            graph.replay()
        if time.monotonic() > until - REST and len(seen) < 2:
            seen.append(_clock_and_power())
        torch.cuda.synchronize()
    settled = replay_microseconds(graph, 4) / (4 * CALLS)
    time.sleep(REST)
    clock, watts = (statistics.mean(values) for values in zip(*seen, strict=True))
    return {"cool_us": cool, "settled_us": settled, "sm_mhz": clock, "watts": watts}


def _clock_and_power() -> tuple[float, float]:
    query = "--query-gpu=clocks.sm,power.draw.instant"
    command = ["nvidia-smi", "-i", "0", query, "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    clock, watts = told.split(",")
    return float(clock), float(watts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def add(layer: str, pattern: str, by: str, call: Callable[[], object]) -> None:
        try:
            found = sustained(call)
        except (BackendError, RuntimeError):
            return  # not every algorithm takes every shape
        rows.append({"layer": layer, "pattern": pattern, "by": by, **found})
        figures = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
        print(f"{layer} {pattern} {by}: {figures}", flush=True)
        write("sustained", rows, options.out)

    for layer, (out, inner) in SHAPES.items():
        x = torch.randn(TOKENS, inner, device="cuda").bfloat16()
        y = torch.empty(TOKENS, out, device="cuda", dtype=torch.bfloat16)
        for text in ("dense", "6:8", "2:4"):
            pattern = Pattern.parse(text)
            ternary, scale = ternarize(torch.randn(out, inner, device="cuda"), pattern)
            weight = prepare(ternary, row_scale(scale, (), out), pattern)
            if weight.structured is None:
                x_q, x_scale = quantize_fused(x)
                for name in triton_dense.candidates(x_q, weight.dense):
                    tiles = triton_dense.CANDIDATES[name]
                    given = (x_q, x_scale.reshape(-1), weight.dense, weight.w_scale, None, y)
                    add(layer, text, f"tile {name}", partial(triton_dense.run, *given, tiles))
                continue
            x_q, _ = quantize_fused(x, group=weight.group)
            shape = (x.device.index, TOKENS, out, x_q.shape[1])
            for algorithm in range(cusparselt._plan(*shape, None).algorithms):
                plan = cusparselt._plan(*shape, algorithm)
                given = (plan, x_q, weight.structured, weight.w_scale, y)
                add(layer, text, f"algorithm {algorithm}", partial(cusparselt._run, *given))


if __name__ == "__main__":
    main()
