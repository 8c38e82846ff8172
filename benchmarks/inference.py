"""Prefill and decode of Qwen2.5 3B and 7B shapes on a GPU: python benchmarks/inference.py

Rows and what is in the time: see ``sparse_bitnet.bench.inference``. The file is written after
every row. ``--profile`` prints the kernels of one step of each kind instead of timing it.
``--power`` runs each kind alone for two seconds and notes the clock and power that it settles at:
products that keep more of the chip busy run at lower clocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from gpu_common import write
from sparse_bitnet.bench.harness import capture, compile_parts, random_decoder
from sparse_bitnet.bench.inference import KINDS, Case, call_of, measure
from sparse_bitnet.kernels.environment import gpu_state

PREFILL = ((1, 512), (1, 2048), (4, 4096), (1, 16384), (16, 4096))
DECODE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT = 512


def profile(preset: str, case: Case, kinds: list[str]) -> None:
    """Print the device time of every kernel of one pass."""
    for kind in kinds:
        decoder = random_decoder(preset, kind, head=case.head)
        compile_parts(decoder)
        call = call_of(decoder, case)
        for _ in range(3):
            call()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as found:
            call()
            torch.cuda.synchronize()
        print(f"== {preset} {kind} {case}")
        print(found.key_averages().table(sort_by="cuda_time_total", row_limit=24)[:9000])
        del decoder, call
        torch.cuda.empty_cache()


def power(preset: str, case: Case, kinds: list[str], out: Path | None) -> None:
    """Milliseconds, SM clock and power of each kind running alone, after a second of it."""
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        decoder = random_decoder(preset, kind)
        compile_parts(decoder)
        graph = capture([call_of(decoder, case)])
        times: list[float] = []
        states: list[dict[str, Any]] = []
        started = time.monotonic()
        while time.monotonic() - started < 2.0:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(2):
                graph.replay()
            end.record()
            if time.monotonic() - started > 1.0:
                states.append(gpu_state())
            end.synchronize()
            times.append(start.elapsed_time(end) / 2)
        row = {
            "model": preset,
            "case": str(case),
            "kind": kind,
            "milliseconds": statistics.median(times[len(times) // 2 :]),
            **{name: statistics.median(s[name] for s in states) for name in ("sm_mhz", "watts")},
        }
        print(row, flush=True)
        every = {name: [state[name] for state in states] for name in ("sm_mhz", "watts")}
        rows.append(row | {"all": {"milliseconds": [round(t, 3) for t in times], **every}})
        write("inference_power", rows, out)
        del graph, decoder
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["qwen2.5-7b", "qwen2.5-3b"])
    parser.add_argument("--kinds", nargs="+", default=["bf16", "fp8", *KINDS[1:]])
    parser.add_argument("--prefill", nargs="*", default=[f"{b}x{n}" for b, n in PREFILL])
    parser.add_argument("--decode", nargs="*", type=int, default=list(DECODE))
    parser.add_argument("--int8-head", nargs="*", type=int, default=[1], help="decode batches too")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--power", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    cases = []
    for text in options.prefill:
        batch, length = text.split("x")
        cases.append(Case("prefill", int(batch), int(length)))
    cases += [Case("decode", batch, CONTEXT) for batch in options.decode]
    cases += [Case("decode", batch, CONTEXT, "int8") for batch in options.int8_head]
    if options.power:
        with torch.no_grad():
            power(options.models[0], cases[0], options.kinds, options.out)
        return
    if options.profile:
        with torch.no_grad():
            for case in cases:
                profile(options.models[0], case, options.kinds)
        return
    rows = []
    started = time.monotonic()
    for preset in options.models:
        for row in measure(preset, cases, kinds=tuple(options.kinds), repeats=options.repeats):
            print(f"{time.monotonic() - started:5.0f} s  {row}", flush=True)
            rows.append(row.to_dict())
            write("inference", rows, options.out)
            if time.monotonic() - started > 60 * options.minutes:
                return


if __name__ == "__main__":
    main()
