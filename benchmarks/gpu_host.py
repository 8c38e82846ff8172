"""Host time of one call on an NVIDIA GPU: python benchmarks/gpu_host.py

Microseconds that Python and the launch take, not the device: few calls in a row, timed on the host
while the device lags behind. ``x + x`` and a bf16 ``F.linear`` are the yardstick of the host at
hand. Products get activations that are quantized already, ``layer`` quantizes them itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from gpu_common import summary, write
from sparse_bitnet import console
from sparse_bitnet.kernels import ternary_matmul
from sparse_bitnet.kernels.quantize_activations import quantize_fused
from sparse_bitnet.kernels.registry import integer_linear, prepare, ternary_linear

SHAPES = {
    "7B gate_up": (37888, 3584),
    "7B down": (3584, 18944),
    "7B qkv": (4608, 3584),
    "7B o": (3584, 3584),
}
MANY, FEW = 64, 1
CALLS = 20  # in a row: far fewer than the launches that a stream holds
WARM_UP = 20


def host_microseconds(call: Callable[[], object]) -> float:
    """Of one of ``CALLS`` calls that begin with an idle device."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - started) * 1e6 / CALLS


def calls_of(out: int, columns: int) -> dict[str, Callable[[], object]]:
    """Every kind of call for one shape: its name → the call."""
    ternary = torch.randint(-1, 2, (out, columns), dtype=torch.int8, device="cuda")
    weight = prepare(ternary, torch.rand(out, device="cuda"))
    x = torch.randn(MANY, columns, device="cuda").bfloat16()
    token = x[:FEW]
    bf16 = torch.randn(out, columns, device="cuda").bfloat16()
    x_q, x_scale = quantize_fused(x)
    token_q, token_scale = quantize_fused(token)
    dtype = torch.bfloat16
    return {
        "x + x": lambda: x + x,
        "F.linear, bf16": lambda: F.linear(x, bf16),
        "quantization": lambda: quantize_fused(x),
        "int8 product": lambda: ternary_matmul(x_q, x_scale, ternary, weight.w_scale, None, dtype),
        "two-bit product, 1 token": lambda: integer_linear(
            token_q, token_scale, weight, None, dtype
        ),
        "two-bit product, 64 tokens": lambda: integer_linear(x_q, x_scale, weight, None, dtype),
        "layer, 64 tokens": lambda: ternary_linear(x, weight),
    }


def measure(shape: str, repeats: int) -> dict[str, list[float]]:
    """All repeats of every call of a shape, in turns."""
    calls = calls_of(*SHAPES[shape])
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(host_microseconds(call))
    return times


def table(rows: list[dict[str, Any]]) -> Table:
    """Medians, a column for each shape."""
    table = Table("µs of the host", *(row["layer"] for row in rows), title="one call")
    for name in dict.fromkeys(name for row in rows for name in row["microseconds"]):
        medians = [row["microseconds"].get(name, {}).get("median") for row in rows]
        table.add_row(name, *("-" if m is None else f"{m:.1f}" for m in medians))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=3.0, help="begin nothing after that")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for layer in options.layers:
            if time.monotonic() - started > 60 * options.minutes:
                break
            times = measure(layer, options.repeats)
            row = {"layer": layer, "calls_in_a_row": CALLS}
            rows.append(row | {"microseconds": {n: summary(t) for n, t in times.items()}})
            write("host", rows, options.out)
            medians = (f"{n} {statistics.median(t):.1f}" for n, t in times.items())
            console.say(f"{layer}: {', '.join(medians)}")
            torch.cuda.empty_cache()
    console.out.print(table(rows))


if __name__ == "__main__":
    main()
