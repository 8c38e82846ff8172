"""Tokens a second on a CPU: this package beside llama.cpp and transformers, one run, in turns.

    python benchmarks/cpu_inference.py [--rounds 5] [--threads 2] [--layers 28] [--fp32]

Qwen2.5-1.5B's shape with a vocabulary of 32,000, and the same random ternary weights in every row
(2:4 apart, which masks more of them). Each round prefills 512 tokens and decodes 64 more, greedily,
with every engine, one after the other, so whatever else the machine does hits all alike; then the
read bandwidth of the memory is measured. Engines live in processes of their own and sleep between
their turns. Reported are medians; ratios are medians over rounds of the ratio within a round.

llama.cpp (``pip install llama-cpp-python gguf``) is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sparse_bitnet.console import out, progress, say
from sparse_bitnet.files import write_text
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.environment import measured_on
from sparse_bitnet.kernels.native.pages import use_large_pages

RESULTS = Path(__file__).parent / "results" / "cpu" / "cpu_inference.json"
PROMPT, NEW = 512, 64
OURS, OURS_24, TQ2 = "ours 6:8, two-bit", "ours 2:4, 1.5-bit", "llama.cpp TQ2_0"
BF16, FP32 = "transformers bf16", "transformers fp32"
MODULES = {"torch": "torch", "transformers": "transformers", "llama-cpp-python": "llama_cpp"}
TARGETS = (  # (stage, row, over, at least)
    ("decode", OURS, TQ2, 1.8),
    ("decode", OURS, BF16, 8.0),
    ("decode", OURS, "bandwidth", 0.65),
    ("decode", OURS_24, OURS, 1.1),
    ("prefill", OURS, BF16, 1.3),
    ("prefill", OURS, TQ2, 3.0),
)


def serve(row: str, layers: int, threads: int, gguf: str) -> None:
    """The other process: build the row's engine, then a line of JSON for each line read."""
    import cpu_models

    torch.set_num_threads(threads)
    if row == TQ2:
        engine: cpu_models.Engine = cpu_models.LlamaCpp(Path(gguf), threads)
    elif row in (BF16, FP32):
        dtype = torch.bfloat16 if row == BF16 else torch.float32
        engine = cpu_models.Transformers("6:8", False, dtype, layers)
    else:
        pattern = "2:4" if row == OURS_24 else "6:8"
        engine = cpu_models.Transformers(pattern, True, torch.bfloat16, layers)
    answer: dict[str, Any] = {"weight_bytes": engine.weight_bytes}
    while True:
        print(json.dumps(answer), flush=True)
        command = sys.stdin.readline().split()
        if not command:
            os._exit(0)  # llama.cpp's destructor does not survive the interpreter's end
        new = int(command[0])
        answer = {"prefill": engine.prefill([i * 37 % 32_000 for i in range(PROMPT)])}
        answer["decode"] = engine.decode(new)


@dataclass
class Row:
    """An engine in its process, and what each round took, in tokens a second."""

    name: str
    process: subprocess.Popen[str]
    weight_bytes: int = 0
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, new: int, count: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{new}\n")
        self.process.stdin.flush()
        times = self.answer()
        if count:
            self.prefill.append(PROMPT / times["prefill"])
            self.decode.append(new / times["decode"])


def read_bandwidth(memory: torch.Tensor) -> float:
    """GB/s of summing a tensor much larger than the caches."""
    started = time.perf_counter()
    memory.sum()
    return memory.nbytes / (time.perf_counter() - started) / 1e9


def measure(names: list[str], rounds: int, threads: int, layers: int) -> dict[str, Any]:
    """All rows in turns; the contents of the JSON file."""
    torch.set_num_threads(threads)
    memory = torch.ones(2**28)
    use_large_pages(memory)
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        if TQ2 in names:
            import cpu_models

            say("writing the GGUF file")
            cpu_models.write_gguf(gguf, "6:8", layers)
        rows, bandwidth = [], []
        with progress("rounds", (rounds + 1) * len(names)) as task:
            for name in names:
                command = [sys.executable, __file__, "--serve", name, "--gguf", str(gguf)]
                command += ["--layers", str(layers), "--threads", str(threads)]
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                row = Row(name, process)
                row.weight_bytes = row.answer()["weight_bytes"]
                rows.append(row)
            for index in range(rounds + 1):
                for row in rows:
                    # Full precision reads ten times the bytes for every token: fewer will do.
                    row.run(NEW if row.name not in (BF16, FP32) else 16, count=index > 0)
                    task.advance(detail=row.name)
                if index:
                    bandwidth.append(max(read_bandwidth(memory) for _ in range(3)))
        for row in rows:
            assert row.process.stdin is not None
            row.process.stdin.close()
            row.process.wait()
    return {
        "shape": f"Qwen2.5-1.5B, {layers} layers, vocabulary 32000",
        "prompt": PROMPT,
        "new_tokens": NEW,
        "threads": threads,
        "rounds": rounds,
        "machine": measured_on()
        | {name: version(name) for name, module in MODULES.items() if find_spec(module)}
        | {"kernel_path": native.explanation()},
        "read_bandwidth_gb_s": {"median": statistics.median(bandwidth), "all": bandwidth},
        "rows": {
            row.name: {
                "weight_bytes": row.weight_bytes,
                "prefill_tokens_s": {"median": statistics.median(row.prefill), "all": row.prefill},
                "decode_tokens_s": {"median": statistics.median(row.decode), "all": row.decode},
                "decode_gb_s": statistics.median(row.decode) * row.weight_bytes / 1e9,
            }
            for row in rows
        },
    }


def ratios(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets, and what was reached."""
    rows, found = result["rows"], []
    for stage, name, over, least in TARGETS:
        if name not in rows or (over not in rows and over != "bandwidth"):
            continue
        mine = rows[name][f"{stage}_tokens_s"]["all"]
        if over == "bandwidth":
            weight_bytes = rows[name]["weight_bytes"]
            other = [gb * 1e9 / weight_bytes for gb in result["read_bandwidth_gb_s"]["all"]]
        else:
            other = rows[over][f"{stage}_tokens_s"]["all"]
        ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
        found.append({"stage": stage, "row": name, "over": over, "ratio": ratio, "target": least})
    return found


def table(result: dict[str, Any]) -> Table:
    """Tokens a second by row."""
    table = Table(title=f"{result['shape']}, {result['threads']} threads: tokens/s")
    for column in ("", "MB a token", f"prefill {PROMPT}", f"decode {NEW}", "GB/s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in result["rows"].items():
        table.add_row(
            name,
            f"{row['weight_bytes'] / 1e6:.0f}",
            f"{row['prefill_tokens_s']['median']:.0f}",
            f"{row['decode_tokens_s']['median']:.1f}",
            f"{row['decode_gb_s']:.1f}",
        )
    bandwidth = result["read_bandwidth_gb_s"]["median"]
    table.add_row("memory, read only", "", "", "", f"{bandwidth:.1f}", style="dim")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--fp32", action="store_true", help="transformers in fp32 too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--gguf", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.layers, options.threads, options.gguf)
        return
    names = [OURS, OURS_24, BF16]
    if find_spec("llama_cpp") and find_spec("gguf"):
        names.insert(2, TQ2)
    else:
        say("llama.cpp is left out: pip install llama-cpp-python gguf")
    if options.fp32:
        names.append(FP32)
    result = measure(names, options.rounds, options.threads, options.layers)
    result["ratios"] = ratios(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.output, json.dumps(result, indent=2) + "\n")
    out.print(table(result))
    for one in result["ratios"]:
        verdict = "reached" if one["ratio"] >= one["target"] else "missed"
        out.print(
            f"{one['stage']}: {one['row']} is {one['ratio']:.2f} × {one['over']} "
            f"(target {one['target']}: {verdict})"
        )


if __name__ == "__main__":
    main()
