"""What fp8 backward products do to a training curve: python benchmarks/fp8_backward.py

Trains one small model with ``method.backward`` full and fp8, from the same weights over the same
batches, a few seeds each; then compares training loss along the way and validation loss at the end.
The spread between seeds is the scale on which a difference means something. Without a GPU the e4m3
roundings are emulated, so the curve is the same up to the order of sums, only slower.

    python benchmarks/fp8_backward.py --data data/prose --preset study-5m --steps 2000

Without --data it trains on the sources of Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from gpu_common import report
from sparse_bitnet import console
from sparse_bitnet.core import Method
from sparse_bitnet.data import prepare
from sparse_bitnet.train import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainConfig,
    train,
)

PRECISIONS = ("full", "fp8")
POINTS = 40


def recipe(options: argparse.Namespace, data: Path, precision: Any, seed: int) -> TrainConfig:
    name = f"{options.preset}-{options.pattern.replace(':', 'of')}-{precision}-{seed}"
    return TrainConfig(
        data=DataConfig(
            path=str(data), sequence_length=options.sequence_length, batch_size=options.sequences
        ),
        model=ModelConfig(source=options.preset),
        sparsity=SparsityConfig(options.pattern, "bitnet", Method(backward=precision)),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate),
        schedule=ScheduleConfig(steps=options.steps),
        run=RunConfig(
            directory=str(options.directory / name),
            seed=seed,
            cuda_graph=options.cuda_graph,
            log_every=max(1, options.steps // POINTS),
            layers_every=0,
            validate_every=max(1, options.steps // 8),
            checkpoint_every=0,
            export=False,
        ),
    )


def run(options: argparse.Namespace, data: Path, precision: str, seed: int) -> dict[str, Any]:
    result = train(recipe(options, data, precision, seed))
    rows = [json.loads(line) for line in result.history.read_text(encoding="utf-8").splitlines()]
    return {
        "backward": precision,
        "seed": seed,
        "tokens": result.tokens,
        "linear_weights": result.linear_weights,
        "validation_loss": result.validation_loss,
        "loss": [[row["step"], row["loss"]] for row in rows if "loss" in row],
        "validation": [
            [row["step"], row["validation_loss"]] for row in rows if "validation_loss" in row
        ],
    }


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of fp8 minus full: at every logged step, and at the end."""
    by_seed = {(row["backward"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows if ("fp8", row["seed"]) in by_seed})
    pairs = [(by_seed["full", seed], by_seed["fp8", seed]) for seed in seeds]
    ends = [fp8["validation_loss"] - full["validation_loss"] for full, fp8 in pairs]
    curves = [
        [b - a for (_, a), (_, b) in zip(full["loss"], fp8["loss"], strict=True)]
        for full, fp8 in pairs
    ]
    full_ends = [full["validation_loss"] for full, _ in pairs]
    return {
        "seeds": seeds,
        "validation_loss_difference": ends,
        "training_loss_difference": [statistics.mean(step) for step in zip(*curves, strict=True)],
        "steps": [step for step, _ in pairs[0][0]["loss"]] if pairs else [],
        "spread_of_seeds": max(full_ends) - min(full_ends) if full_ends else 0.0,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="prepared tokens")
    parser.add_argument("--preset", default="study-5m")
    parser.add_argument("--pattern", default="6:8")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sequences", type=int, default=128, help="a step")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--directory", type=Path, default=Path("runs/fp8-backward"))
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args(arguments)
    data = options.data
    if data is None:
        data = options.directory / "data"
        prepare("stdlib", data, vocab_size=8192)
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for seed in options.seeds:
        for precision in PRECISIONS:
            rows.append(run(options, data, precision, seed))
            last = rows[-1]["validation_loss"]
            console.say(f"seed {seed}, backward {precision}: validation loss {last:.4f}")
        summary = compare(rows)
        report("fp8_backward", [*rows, {"summary": summary}], options.out)
    differences = " ".join(f"{d:+.4f}" for d in summary["validation_loss_difference"])
    console.out.print(
        f"validation loss, fp8 minus full: {differences} nats a token by seed; "
        f"seeds alone spread by {summary['spread_of_seeds']:.4f}"
    )
    return summary


if __name__ == "__main__":
    main()
