"""One training step on an NVIDIA GPU, everything included: python benchmarks/training_step.py

A step is forward, output head and loss over 151,936 tokens of vocabulary, backward, gradient
clipping, fused AdamW, and, in our rows, deriving the ternary weights anew. All rows have float32
master weights under bf16 autocast, flash attention, blocks compiled one by one, the same loss and
the same micro-batch. Rows:

    bf16             nn.Linear
    fake-quant 6:8   weights and inputs quantized in floating point at every forward, bf16 products:
                     how the published code trains
    dense, 6:8 …     this package; with ``fp8`` its backward products are in e4m3, with
                     ``plain-compile`` the compiler has its defaults

Rows take turns, round by round, over one set of parameters and optimizer moments. Reported are
medians over all timed steps, the peak of allocated memory, and model FLOPs utilization: 6 a
parameter and token (the embedding counts once, as the head) plus causal attention, against the
dense bf16 peak. The file is written after every round; a row that fails is noted and left out.

    --profile "6:8"  instead of timing: the kernels of one step of that row, by device time
    --graph          forward and backward replayed as one CUDA graph, in all rows, as
                     ``run.cuda_graph`` does: both are then in the forward's time
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu_common import write
from sparse_bitnet import console
from sparse_bitnet.data.loader import Batch
from sparse_bitnet.train.config import OptimizerConfig
from sparse_bitnet.train.graph import GraphedBackward
from sparse_bitnet.train.model import maskless_attention
from sparse_bitnet.train.optim import build_optimizer, clip_gradients
from sparse_bitnet.train.presets import PRESETS, Shape
from training_models import Candidate, Row, base_model

SIZES = {"3b": 8, "1.5b": 24, "0.5b": 48}
"""Sequences that fill 139 GiB, by size; on an out-of-memory error all rows go on with fewer."""
ROWS = ("bf16", "fake-quant 6:8", "dense", "6:8", "dense fp8", "6:8 fp8")
SEQUENCE = 2048
PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200 SXM, datasheet
PARTS = ("forward", "backward", "optimizer")
LEARNING_RATE = 1e-5


@dataclass
class Setting:
    """What one size is measured with."""

    preset: str
    sequences: int
    sequence: int
    vocabulary: int | None
    device: torch.device
    compiled: bool
    graph: bool

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence

    @property
    def shape(self) -> Shape:
        return PRESETS[self.preset]

    @property
    def flops(self) -> float:
        """Of a dense step: products with parameters, and attention under a causal mask."""
        head = (self.vocabulary or self.shape.vocab_size or 0) * self.shape.hidden
        attention = self.shape.layers * self.shape.hidden * self.sequence * 6
        return self.tokens * (6.0 * (self.shape.linear_weights + head) + attention)


@dataclass
class Measured:
    """All timed steps of one row, milliseconds."""

    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    peak_bytes: int = 0
    first_step_seconds: float = 0.0
    loss: float = float("nan")

    @property
    def steps(self) -> list[float]:
        return [sum(step) for step in zip(*self.parts.values(), strict=True)]


class Marks:
    """Points in a device's time, read only when all work is done."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[Any] = []
        self._cuda = device.type == "cuda"

    def add(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._events.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each mark and the next."""
        pairs = zip(self._events, self._events[1:], strict=False)
        if self._cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


class Bench:
    """One size: the shared parameters, the optimizer, the rows."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.base: PreTrainedModel = base_model(setting.preset, setting.vocabulary, setting.device)
        self.parameters = [p for p in self.base.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.base, OptimizerConfig(learning_rate=LEARNING_RATE))
        shape = (setting.sequences, setting.sequence + 1)
        tokens = torch.randint(0, self.base.vocab_size, shape, device=setting.device)
        self.batch = Batch.of(tokens)
        self.candidates: dict[str, Candidate] = {}
        self.graph: GraphedBackward | None = None

    def add(self, name: str) -> None:
        self.candidates[name] = Candidate(Row.parse(name), self.base, self.setting.compiled)

    def step(self, candidate: Candidate, marks: Marks | None = None) -> Tensor:
        """One optimizer step; nothing in it waits for the device."""

        def mark() -> None:
            if marks is not None:
                marks.add()

        mark()
        if self.graph:
            loss = self.graph([self.batch])
            mark()
        else:
            with torch.autocast(self.setting.device.type, torch.bfloat16):
                loss = candidate.loss_of(self.batch)[0]
            mark()
            loss.backward()
        mark()
        clip_gradients(self.parameters, 1.0)
        self.optimizer.step()
        if not self.graph:  # which writes gradients over the last ones
            self.optimizer.zero_grad()
        return loss.detach()

    def capture(self, candidate: Candidate) -> GraphedBackward:
        """One graph stands at a time: it holds the activations of its row."""

        def backward(batches: Sequence[Batch]) -> Tensor:
            with torch.autocast(self.setting.device.type, torch.bfloat16):
                loss: Tensor = candidate.loss_of(batches[0])[0]
            loss.backward()
            return loss.detach()

        return GraphedBackward(backward, self.parameters)

    def turn(self, name: str, steps: int, measured: Measured) -> None:
        """Wake a row, take one step to warm up and ``steps`` timed ones, let it rest."""
        candidate = self.candidates[name]
        cuda = self.setting.device.type == "cuda"
        try:
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            if self.setting.graph:
                self.graph = self.capture(candidate)
            loss = self.step(candidate)
            if not measured.steps:
                measured.loss = loss.item()
                measured.first_step_seconds = time.perf_counter() - started
                loss = self.step(candidate)  # the first one after compilation still chooses kernels
            marks = Marks(self.setting.device)
            for _ in range(steps):
                self.step(candidate, marks)
            marks.add()
            for index, took in enumerate(marks.milliseconds()):
                measured.parts[PARTS[index % len(PARTS)]].append(took)
            if cuda:
                measured.peak_bytes = torch.cuda.max_memory_allocated()
        finally:
            self.graph = None
            self.optimizer.zero_grad()


def describe(setting: Setting, name: str, measured: Measured, bench: Bench) -> dict[str, Any]:
    step = statistics.median(measured.steps)
    return {
        "size": setting.preset,
        "row": name,
        "sequences": setting.sequences,
        "sequence": setting.sequence,
        "milliseconds": step,
        **{f"{p}_milliseconds": statistics.median(t) for p, t in measured.parts.items()},
        "tokens_per_second": setting.tokens / step * 1e3,
        "peak_gib": measured.peak_bytes / 2**30,
        "mfu": setting.flops / (step * 1e-3) / PEAK_FLOPS,
        "first_loss": measured.loss,
        "first_step_seconds": measured.first_step_seconds,
        "all_milliseconds": [round(t, 3) for t in measured.steps],
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to every row its speed over the bf16 row and over our dense row of its size."""
    for row in rows:
        for label, other in (("over_bf16", "bf16"), ("over_dense", "dense")):
            same = [r for r in rows if r["size"] == row["size"] and r["row"] == other]
            if same and "milliseconds" in row and "milliseconds" in same[0]:
                row[label] = same[0]["milliseconds"] / row["milliseconds"]


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    start = f"{row['size']:13} {row['row']:16}"
    if "milliseconds" not in row:
        return f"{start} failed: {row['failed'][:100]}"
    parts = " + ".join(f"{row[part + '_milliseconds']:.1f}" for part in PARTS)
    ratios = [f"{row[f'over_{o}']:.3f}× {o}" for o in ("bf16", "dense") if f"over_{o}" in row]
    return (
        f"{start} {row['milliseconds']:7.1f} ms ({parts})  {row['tokens_per_second']:9,.0f} "
        f"tokens/s  MFU {row['mfu']:.1%}  {row['peak_gib']:.1f} GiB  {'  '.join(ratios)}"
    )


class Budget:
    """Seconds left; nothing new is begun that would not end in time."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def has(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self._end


def measure(
    setting: Setting, names: list[str], rounds: int, steps: int, budget: Budget, save: Any
) -> list[dict[str, Any]]:
    """All rows of one size, in turns.

    Raises:
        torch.cuda.OutOfMemoryError: if a row does not fit.
    """
    bench = Bench(setting)
    measured: dict[str, Measured] = {}
    failed: dict[str, str] = {}

    def rows() -> list[dict[str, Any]]:
        done = [describe(setting, n, m, bench) for n, m in measured.items() if m.steps]
        return done + [
            {"size": setting.preset, "row": name, "failed": why} for name, why in failed.items()
        ]

    took = 0.0
    with maskless_attention(bench.base):
        for turn in range(rounds):
            started = time.monotonic()
            for name in names:
                if name in failed or not budget.has(took if turn else 20.0):
                    continue
                try:
                    if name not in bench.candidates:
                        bench.add(name)
                    bench.turn(name, steps, measured.setdefault(name, Measured()))
                except torch.cuda.OutOfMemoryError:
                    raise
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}"[:2000]
                    console.say(traceback.format_exc())
                    continue
                if not turn:
                    got = measured[name]
                    console.say(
                        f"{setting.preset} {name}: {statistics.median(got.steps):.1f} ms a step, "
                        f"loss {got.loss:.3f}, {got.peak_bytes / 2**30:.1f} GiB, first step "
                        f"{got.first_step_seconds:.0f} s"
                    )
                    save(rows())
            save(rows())
            took = (time.monotonic() - started) / max(1, len(names)) if turn else 20.0
    return rows()


def profile(setting: Setting, name: str, out: Path | None) -> None:
    """Print the kernels of one step by device time; with ``out``, write a trace beside it."""
    bench = Bench(setting)
    with maskless_attention(bench.base):
        bench.add(name)
        candidate = bench.candidates[name]
        for _ in range(3):
            bench.step(candidate)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
            activities = [torch.profiler.ProfilerActivity.CUDA]
        marks = Marks(setting.device)
        bench.step(candidate, marks)
        marks.add()
        took = marks.milliseconds()
        with torch.profiler.profile(activities=activities) as profiler:
            bench.step(candidate)
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=_device_time, reverse=True)
    total = sum(map(_device_time, events))
    parts = ", ".join(f"{part} {t:.1f}" for part, t in zip(PARTS, took, strict=True))
    lines = [f"{setting.preset} {name}: step {sum(took):.1f} ms ({parts}); kernels {total:.1f} ms"]
    for event in events[:60]:
        ms = _device_time(event)
        lines.append(
            f"{ms:9.3f} ms {ms / max(total, 1e-9):6.1%} {event.count:6d}×  {event.key[:150]}"
        )
    console.out.print("\n".join(lines), markup=False, highlight=False)
    if out is not None:
        label = f"{setting.preset}_{name}".replace(" ", "_").replace(":", "of")
        out.mkdir(parents=True, exist_ok=True)
        (out / f"profile_{label}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _device_time(event: Any) -> float:
    """Milliseconds of a kernel itself; on CPU, of an operator itself."""
    return max(event.self_device_time_total, 0.0) / 1e3 or event.self_cpu_time_total / 1e3


def free() -> None:
    """Give back the memory of one size before the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # sizes differ, none should be slower
def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["3b"], help="of Qwen2.5, or preset names")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a row and round")
    parser.add_argument("--sequences", type=int, help="micro-batch; by default what fills the GPU")
    parser.add_argument("--sequence-length", type=int, default=SEQUENCE)
    parser.add_argument("--vocabulary", type=int, help="for presets that publish none")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin nothing after that")
    parser.add_argument("--profile", metavar="ROW", nargs="+", help="kernels of a step, no timing")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--graph", action="store_true", help="a step is one CUDA graph")
    parser.add_argument(
        "--attention", choices=["default", "cudnn"], default="default", help="kernel, for all rows"
    )
    parser.add_argument("--name", default="training_step", help="of the JSON file")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.attention == "cudnn":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
    budget = Budget(options.minutes)
    finished: list[dict[str, Any]] = []

    def save(rows: list[dict[str, Any]]) -> None:
        everything = finished + rows
        compare(everything)
        write(options.name, everything, options.out)

    for size in options.sizes:
        preset = size if size in PRESETS else f"qwen2.5-{size}"
        sequences = options.sequences or SIZES.get(size, 8)
        while sequences:
            setting = Setting(
                preset,
                sequences,
                options.sequence_length,
                options.vocabulary,
                device,
                not options.no_compile,
                options.graph,
            )
            torch._dynamo.reset()
            try:
                if options.profile:
                    for name in options.profile:
                        profile(setting, name, options.out)
                        free()
                else:
                    work = (options.rows, options.rounds, options.steps, budget, save)
                    finished += measure(setting, *work)
                sequences = 0
            except torch.cuda.OutOfMemoryError as error:
                console.say(f"{preset} with {sequences} sequences: {str(error)[:200]}")
                sequences = sequences * 3 // 4
            free()
    compare(finished)
    for row in finished:
        console.out.print(line(row), markup=False, highlight=False, soft_wrap=True)
    return finished


if __name__ == "__main__":
    main()
