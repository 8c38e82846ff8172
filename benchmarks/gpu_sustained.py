"""Products at the clock that lasts: python benchmarks/gpu_sustained.py

Every dense tile and every algorithm of the sparse library on 7B shapes, 16,384 tokens: microseconds
of the first calls on a cool GPU, and after most of a second of nothing else, with the clock and the
power that it settles at. Products only, without quantization.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_common import write
from sparse_bitnet.bench.harness import capture, replay_microseconds
from sparse_bitnet.core import BackendError, Pattern, row_scale
from sparse_bitnet.kernels import ternarize
from sparse_bitnet.kernels.environment import gpu_state
from sparse_bitnet.kernels.matmul import cusparselt, triton_dense
from sparse_bitnet.kernels.quantize_activations import quantize_fused
from sparse_bitnet.kernels.weight import prepare

TOKENS = 16384
SHAPES = {"7B gate_up": (37888, 3584), "7B down": (3584, 18944)}
CALLS = 8  # of a graph
REPEATS = 7
SETTLE, REST = 0.7, 0.25  # seconds


def sustained(call: Callable[[], object]) -> dict[str, Any]:
    """Cool and settled microseconds of a call, and what the GPU settled at, with all repeats.

    There is one cool repeat: the next one would be less cool.
    """
    graph = capture([call], CALLS)
    torch.cuda.synchronize()
    cool = replay_microseconds(graph, 1) / CALLS
    until = time.monotonic() + SETTLE
    states: list[dict[str, Any]] = []
    while time.monotonic() < until:
        for _ in range(6):
            graph.replay()
        if time.monotonic() > until - REST and len(states) < 2:
            states.append(gpu_state())
        torch.cuda.synchronize()
    settled = [replay_microseconds(graph, 1) / CALLS for _ in range(REPEATS)]
    time.sleep(REST)
    seen = {name: [state[name] for state in states] for name in ("sm_mhz", "watts")}
    return {
        "cool_us": cool,
        "settled_us": statistics.median(settled),
        **{name: statistics.mean(values) for name, values in seen.items()},
        "all": {"settled_us": [round(t, 2) for t in settled], **seen},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin nothing after that")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    end = time.monotonic() + 60 * options.minutes

    def add(layer: str, pattern: str, by: str, call: Callable[[], object]) -> None:
        if time.monotonic() > end:
            return
        try:
            found = sustained(call)
        except (BackendError, RuntimeError):
            return  # not every algorithm takes every shape
        rows.append({"layer": layer, "pattern": pattern, "by": by, **found})
        figures = ", ".join(f"{n} {value:.0f}" for n, value in found.items() if n != "all")
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
                try:
                    plan = cusparselt._plan(*shape, algorithm)
                except BackendError:
                    continue  # not every algorithm takes every shape
                given = (plan, x_q, weight.structured, weight.w_scale, y)
                add(layer, text, f"algorithm {algorithm}", partial(cusparselt._run, *given))


if __name__ == "__main__":
    main()
