"""Bandwidth of the operations around the product: python benchmarks/gpu_operations.py

Bytes counted: what the operation must read and write once (the weight twice, for two passes), as a
share of what a large device-to-device copy moves.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_common import interleaved, report, summary
from sparse_bitnet import console
from sparse_bitnet.core import Pattern, quantize_int8
from sparse_bitnet.kernels import ternarize
from sparse_bitnet.kernels.quantize_activations import quantize_fused

WEIGHTS = {"7B gate_up": (37888, 3584), "7B down": (3584, 18944), "3B gate_up": (22016, 2048)}
ACTIVATIONS = ((16384, 2048), (4096, 3584), (16384, 3584), (4096, 18944), (65536, 896))
PATTERNS = ("dense", "6:8", "2:4", "4:16", "8:32")
CACHE_BEATING_BYTES = 300_000_000


def copy_bandwidth() -> float:
    """Bytes a microsecond that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(9):  # launched, not from a graph: there a copy goes to the slower copy engine
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return 2 * 2**30 / statistics.median(times)


def ternarize_cases(name: str, dtype: torch.dtype) -> dict[str, tuple[Any, float]]:
    out, columns = WEIGHTS[name]
    weight = (torch.randn(out, columns, device="cuda") * 0.02).to(dtype)
    nbytes = weight.numel() * (2 * weight.element_size() + 1)
    return {
        pattern: ([partial(ternarize, weight, Pattern.parse(pattern))], nbytes)
        for pattern in PATTERNS
        if columns % Pattern.parse(pattern).m == 0
    }


def quantize_cases(tokens: int, columns: int) -> dict[str, tuple[Any, float]]:
    count = max(1, min(8, CACHE_BEATING_BYTES // (tokens * columns * 2)))
    xs = [torch.randn(tokens, columns, device="cuda").bfloat16() for _ in range(count)]
    pairs = [torch.randn(tokens, 2 * columns, device="cuda").bfloat16() for _ in range(count)]
    norm = torch.rand(columns, device="cuda").bfloat16()
    compiled = torch.compile(quantize_int8)
    size = tokens * columns
    cases: dict[str, tuple[Any, float]] = {
        "compiled reference": ([partial(compiled, x) for x in xs], 3 * size)
    }
    cases["plain"] = ([partial(quantize_fused, x) for x in xs], 3 * size)
    cases["norm"] = ([partial(quantize_fused, x, norm, 1e-6) for x in xs], 3 * size)
    cases["swiglu"] = ([partial(quantize_fused, x, swiglu=True) for x in pairs], 5 * size)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    copied = copy_bandwidth()
    console.out.print(f"copy: {copied / 1e6:.2f} TB/s")
    rows: list[dict[str, Any]] = []

    def run(operation: str, size: str, cases: dict[str, tuple[Any, float]]) -> None:
        times = interleaved({name: calls for name, (calls, _) in cases.items()}, 7)
        for name, (_, nbytes) in cases.items():
            share = nbytes / statistics.median(times[name]) / copied
            rows.append(
                {
                    "operation": operation,
                    "size": size,
                    "case": name,
                    "bytes": nbytes,
                    "share_of_copy": share,
                    "microseconds": summary(times[name]),
                }
            )
            took = statistics.median(times[name])
            console.out.print(f"{operation} {size:20} {name:20} {took:8.1f} µs  {share:5.0%}")
        torch.cuda.empty_cache()

    for name in WEIGHTS:
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            run("ternarize", label, ternarize_cases(name, dtype))
    for tokens, columns in ACTIVATIONS:
        run("quantize", f"{tokens}x{columns}", quantize_cases(tokens, columns))
    rows.append({"operation": "copy", "bytes_a_microsecond": copied})
    report("operations", rows, options.out)


if __name__ == "__main__":
    main()
