"""Tokens a second on a CPU: this package beside llama.cpp and transformers, one run, in turns.

    python benchmarks/cpu_inference.py [--shape qwen2.5-1.5b] [--vocabulary 151936] [--layers 28]
        [--rounds 5] [--threads 2] [--llama PYTHON] [--neighbours 2] [--fp32]

The same random ternary weights in every row (2:4 apart, which masks more of them). Each round
prefills 512 tokens and decodes 64 more, given ones, with every engine, one after the other, so
whatever else the machine does hits all alike; then the read bandwidth of the memory is measured.
Engines live in processes of their own and sleep between their turns. Reported are medians; ratios
are medians over rounds of the ratio within a round. ``--neighbours`` decodes again beside so many
busy processes. Results go to ``results/cpu/<processor>/<shape>-<layers>-layers-<vocabulary>.json``.

llama.cpp is left out without ``--llama``, the interpreter of an environment with ``llama-cpp-cffi``
(0.4.42); ``gguf`` is needed beside this package then.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import cpu_models
from machine import cpu_name, measured_on
from sparse_bitnet.console import out, progress
from sparse_bitnet.files import write_text
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.native.pages import use_large_pages

RESULTS = Path(__file__).parent / "results" / "cpu"
PROMPT, NEW, NEW_BESIDE = 512, 64, 32
OURS, OURS_24, OURS_BF16 = "ours 6:8, int8 head", "ours 2:4, int8 head", "ours 6:8, bf16 head"
TQ2, TQ2_F16 = "llama.cpp TQ2_0, Q8_0 head", "llama.cpp TQ2_0, F16 head"
Q4 = "llama.cpp Q4_0, Q8_0 head"
BF16, FP32 = "transformers bf16", "transformers fp32"
OURS_ARE = {OURS: ("6:8", True), OURS_24: ("2:4", True), OURS_BF16: ("6:8", False)}
LLAMA = {TQ2: ("TQ2_0", "Q8_0"), TQ2_F16: ("TQ2_0", "F16"), Q4: ("Q4_0", "Q8_0")}
TARGETS = (  # (stage, row, over, at least)
    ("decode", OURS, TQ2, 1.8),
    ("decode", OURS_BF16, TQ2_F16, 1.8),
    ("decode", OURS, Q4, 1.3),
    ("decode", OURS, "bandwidth", 0.7),
    ("decode", OURS_BF16, "bandwidth", 0.7),
    ("decode", OURS_24, OURS, 1.1),
    ("decode", OURS, BF16, 8.0),
    ("prefill", OURS, BF16, 1.3),
    ("prefill", OURS, TQ2, 3.0),
)
BUSY = "while True: pass"
# The interpreter's llama.cpp asks for a function that older C++ runtimes lack, and never calls it.
MISSING = "void __cxa_call_terminate(void *p) { (void)p; __builtin_trap(); }"


def serve(row: str, shape: cpu_models.Shape, threads: int) -> None:
    """The other process: build the row's engine, then a line of JSON for each line read."""
    torch.set_num_threads(threads)
    if row in OURS_ARE:
        pattern, int8_head = OURS_ARE[row]
        engine = cpu_models.Transformers(shape, pattern, True, int8_head, torch.bfloat16)
    else:
        dtype = torch.bfloat16 if row == BF16 else torch.float32
        engine = cpu_models.Transformers(shape, "6:8", False, False, dtype)
    print(json.dumps({"weight_bytes": engine.weight_bytes}), flush=True)
    while command := sys.stdin.readline().split():
        prompt, new = map(int, command)
        answer = {}
        if prompt:
            answer["prefill"] = engine.prefill([i * 37 % 1000 for i in range(prompt)])
        answer["decode"] = engine.decode(new)
        print(json.dumps(answer), flush=True)


def command_of(row: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Of the row's process; writes its GGUF file."""
    if row not in LLAMA:
        shape = ["--shape", options.shape, "--vocabulary", str(options.vocabulary)]
        shape += ["--layers", str(options.layers), "--threads", str(options.threads)]
        return [sys.executable, __file__, "--serve", row, *shape]
    file, missing = folder / f"{len(list(folder.iterdir()))}.gguf", folder / "missing.so"
    cpu_models.write_gguf(file, shape_of(options), "6:8", *LLAMA[row])
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(missing)]
    subprocess.run(compiler, input=MISSING.encode(), check=True)
    script = Path(__file__).with_name("cpu_llama.py")
    preload = ["env", "-u", "PYTHONPATH", f"LD_PRELOAD={missing}"]
    return [*preload, options.llama, str(script), str(file), str(options.threads)]


def shape_of(options: argparse.Namespace) -> cpu_models.Shape:
    return cpu_models.Shape(options.shape, options.vocabulary, options.layers)


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

    def ask(self, prompt: int, new: int) -> dict[str, float]:
        """Seconds of a prompt, unless it is 0, and of tokens after it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{prompt} {new}\n")
        self.process.stdin.flush()
        return self.answer()

    def run(self, new: int, count: bool) -> None:
        times = self.ask(PROMPT, new)
        if count:
            self.prefill.append(PROMPT / times["prefill"])
            self.decode.append(new / times["decode"])


def read_bandwidth(memory: torch.Tensor) -> float:
    """GB/s of summing a tensor much larger than the caches."""
    started = time.perf_counter()
    memory.sum()
    return memory.nbytes / (time.perf_counter() - started) / 1e9


def beside(row: Row, neighbours: int) -> list[float]:
    """Tokens a second beside 0, 1, … processes that keep a core busy each."""
    found = []
    for count in range(neighbours + 1):
        busy = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(count)]
        time.sleep(0.2)  # until they run
        found.append(NEW_BESIDE / row.ask(64, NEW_BESIDE)["decode"])
        for process in busy:
            process.kill()
            process.wait()
    return found


def measure(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All rows in turns; the contents of the JSON file."""
    torch.set_num_threads(options.threads)
    memory = torch.ones(2**28)
    use_large_pages(memory)
    rows, bandwidth = [], []
    with tempfile.TemporaryDirectory() as folder:
        with progress("rounds", (options.rounds + 1) * len(names)) as task:
            for name in names:
                process = subprocess.Popen(
                    command_of(name, options, Path(folder)),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                row = Row(name, process)
                row.weight_bytes = row.answer()["weight_bytes"]
                rows.append(row)
            for index in range(options.rounds + 1):
                for row in rows:
                    # Full precision reads ten times the bytes for every token: fewer will do.
                    row.run(NEW if row.name not in (BF16, FP32) else 8, count=index > 0)
                    task.advance(detail=row.name)
                if index:
                    bandwidth.append(max(read_bandwidth(memory) for _ in range(3)))
        busy = {
            row.name: beside(row, options.neighbours)
            for row in rows
            if options.neighbours and row.name not in (BF16, FP32)
        }
        for row in rows:
            assert row.process.stdin is not None
            row.process.stdin.close()
            row.process.wait()
    return {
        "shape": f"{options.shape}, {options.layers} layers, vocabulary {options.vocabulary}",
        "prompt": PROMPT,
        "new_tokens": NEW,
        "threads": options.threads,
        "rounds": options.rounds,
        "machine": measured_on()
        | {"flags": cpu_flags(), "kernel_path": native.explanation()}
        | ({"llama.cpp": "llama-cpp-cffi 0.4.42"} if options.llama else {}),
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
        "decode_tokens_s_beside_busy_processes": busy,
    }


def cpu_flags() -> list[str]:
    """The vector instructions that this processor has, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return [flag for flag in flags if flag.startswith(("avx", "amx", "fma", "f16c"))]


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
    parser.add_argument("--shape", default="qwen2.5-1.5b", help="of a preset, or smollm2-135m")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", help="interpreter that has llama-cpp-cffi")
    parser.add_argument("--neighbours", type=int, default=0, help="busy processes, at most")
    parser.add_argument("--rows", nargs="*", help="only those")
    parser.add_argument("--fp32", action="store_true", help="transformers in fp32 too")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, shape_of(options), options.threads)
        return
    names = [OURS, OURS_24, OURS_BF16, BF16]
    if options.llama:
        names += [TQ2, TQ2_F16, Q4]
    if options.fp32:
        names.append(FP32)
    if options.rows:
        names = [name for name in names if name in options.rows]
    result = measure(names, options)
    result["ratios"] = ratios(result)
    processor = re.sub(r"[^A-Za-z0-9.]+", "_", cpu_name()).strip("_")
    size = f"{options.layers}-layers-{options.vocabulary}"
    output = RESULTS / processor / f"{options.shape}-{size}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(result, indent=2) + "\n")
    out.print(table(result))
    for one in result["ratios"]:
        verdict = "reached" if one["ratio"] >= one["target"] else "missed"
        out.print(
            f"{one['stage']}: {one['row']} is {one['ratio']:.2f} × {one['over']} "
            f"(target {one['target']}: {verdict})"
        )
    for name, speeds in result["decode_tokens_s_beside_busy_processes"].items():
        listed = ", ".join(f"{speed:.1f}" for speed in speeds)
        out.print(f"decode beside 0, 1, … busy processes: {name}: {listed} tokens/s")


if __name__ == "__main__":
    main()
