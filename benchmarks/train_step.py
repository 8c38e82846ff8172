"""What Sparse-BitNet adds to one training step on a CPU.

    python benchmarks/train_step.py [--steps 12] [--threads 2]

One step is forward, backward and AdamW, which includes deriving the ternary weights. The model is
of the demo's size; its copies with other linear layers take turns, step by step, so that whatever
else the machine does hits all alike. Reported are medians, the median over rounds of the ratio to
`nn.Linear` in the same round, and the ratio of the fastest steps, since other work can only slow
one down. Processor time (both threads together) stands beside the clock.

Target: 6:8 Sparse-BitNet in at most 1.5 times the step of the same model with `nn.Linear`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, Qwen2ForCausalLM

from machine import measured_on
from sparse_bitnet import demo
from sparse_bitnet.console import out, progress, say
from sparse_bitnet.files import write_text
from sparse_bitnet.nn import convert
from sparse_bitnet.train.presets import PRESETS, preset_config

RESULTS = Path(__file__).parent / "results"
TARGET = 1.5
BATCH, SEQUENCE = demo.BATCH, demo.SEQUENCE
BASELINE, JUDGED = "nn.Linear", "bitnet 6:8"
VARIANTS: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    JUDGED: {"pattern": "6:8"},
    "bitnet dense": {"pattern": "dense"},
    "bf16 baseline 6:8": {"pattern": "6:8", "kind": "bf16"},
}
PARTS = ("forward", "backward", "optimizer")


class Candidate:
    """A model with its optimizer, and what each of its steps took."""

    def __init__(self, options: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.model: PreTrainedModel = Qwen2ForCausalLM(
            preset_config(demo.PRESET, demo.VOCABULARY)
        ).train()
        if options is not None:
            convert(self.model, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.wall: dict[str, list[float]] = {part: [] for part in PARTS}
        self.cpu: list[float] = []

    def step(self, tokens: Tensor) -> None:
        before = time.process_time()
        with self._timed("forward"):
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        with self._timed("backward"):
            loss.backward()
        with self._timed("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.cpu.append(time.process_time() - before)

    def forget(self) -> None:
        """Drop what was measured (the warm-up)."""
        self.cpu.clear()
        for times in self.wall.values():
            times.clear()

    @property
    def seconds(self) -> list[float]:
        return [sum(parts) for parts in zip(*self.wall.values(), strict=True)]

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.wall[part].append(time.perf_counter() - started)


def measure(steps: int) -> dict[str, Candidate]:
    candidates = {name: Candidate(options) for name, options in VARIANTS.items()}
    tokens = torch.randint(0, demo.VOCABULARY, (BATCH, SEQUENCE))
    warm_up = 2
    with progress("train steps", (warm_up + steps) * len(candidates)) as task:
        for index in range(warm_up + steps):
            # Another one begins each round: the first after a pause finds colder caches.
            names = list(candidates)
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                candidates[name].step(tokens)
                task.advance(detail=name)
            if index + 1 == warm_up:
                for candidate in candidates.values():
                    candidate.forget()
    return candidates


def summary(name: str, candidate: Candidate, baseline: Candidate) -> dict[str, Any]:
    def ratio(own: list[float], other: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(own, other, strict=True))

    return {
        "linears": name,
        "seconds": statistics.median(candidate.seconds),
        **{part: statistics.median(candidate.wall[part]) for part in PARTS},
        "cpu_seconds": statistics.median(candidate.cpu),
        "ratio": ratio(candidate.seconds, baseline.seconds),
        "ratio_of_fastest": min(candidate.seconds) / min(baseline.seconds),
        "cpu_ratio": ratio(candidate.cpu, baseline.cpu),
        "all_seconds": candidate.seconds,
        "all_cpu_seconds": candidate.cpu,
    }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu" / "train_step.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = measured_on()
    candidates = measure(options.steps)
    machine["load_average_after"] = os.getloadavg()[0]
    rows = [summary(name, each, candidates[BASELINE]) for name, each in candidates.items()]
    table = Table("ms", "step", *PARTS, "ratio", "fastest", "CPU", "ratio")
    for row in rows:
        table.add_row(
            row["linears"],
            *(f"{1e3 * row[key]:.0f}" for key in ("seconds", *PARTS)),
            f"{row['ratio']:.2f}",
            f"{row['ratio_of_fastest']:.2f}",
            f"{1e3 * row['cpu_seconds']:.0f}",
            f"{row['cpu_ratio']:.2f}",
        )
    out.print(table)
    judged = next(row for row in rows if row["linears"] == JUDGED)
    result = {
        "question": "one training step with 6:8 Sparse-BitNet against nn.Linear on a CPU",
        "target": TARGET,
        "ratio": judged["ratio"],
        "ratio_of_fastest": judged["ratio_of_fastest"],
        "cpu_ratio": judged["cpu_ratio"],
        "reached": judged["ratio"] <= TARGET,
        "model": {"preset": demo.PRESET, "vocabulary": demo.VOCABULARY}
        | asdict(PRESETS[demo.PRESET])
        | {"batch": BATCH, "sequence": SEQUENCE},
        "rows": rows,
        "environment": machine,
    }
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    say(f"ratio {judged['ratio']:.2f}, target {TARGET}; written to {options.output}")


if __name__ == "__main__":
    main()
