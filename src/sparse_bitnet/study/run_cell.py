"""Run one cell of a sweep: train, measure, make its row."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.core import ConfigError, PatternError, TrainingError
from sparse_bitnet.data import TokenShards
from sparse_bitnet.evaluate.measure import Measurements, measure
from sparse_bitnet.evaluate.scoring import check_window
from sparse_bitnet.files import read_json_lines
from sparse_bitnet.kernels.environment import environment
from sparse_bitnet.study.cells import Job
from sparse_bitnet.study.polarization import early_and_late
from sparse_bitnet.study.rows import append_row
from sparse_bitnet.train import train
from sparse_bitnet.train.config import TrainConfig
from sparse_bitnet.train.export import load_trained
from sparse_bitnet.train.model import convert_model, empty_model
from sparse_bitnet.train.monitor import read_history
from sparse_bitnet.train.recipe import to_dict
from sparse_bitnet.train.result import RESULT, TrainResult
from sparse_bitnet.train.signals import TrainingInterruptedError

# Fractions of training at which the weights' histograms are taken.
SNAPSHOTS = (0.0, 0.1, 0.5, 1.0)
SNAPSHOT_FILE = "polarization.jsonl"
POINTS = 250


def run_cell(job: Job, report: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Train a cell in its run's directory (going on where it was left) and measure it.

    Args:
        report: called with (steps done, steps) after every step.

    Returns:
        The row (see :mod:`sparse_bitnet.study.rows`), without ``key``. A run that diverged gives a
        row of status ``diverged``, with the reason and the histories so far.

    Raises:
        ConfigError, DataError, CheckpointError: as :func:`sparse_bitnet.train.train`.
        TrainingInterruptedError: after SIGTERM or Ctrl-C.
    """
    started, config = time.perf_counter(), job.config
    directory = Path(config.run.directory)
    steps = config.schedule.steps
    wanted = {max(1, round(fraction * steps)): fraction for fraction in SNAPSHOTS}

    def watch(done: int, model: PreTrainedModel) -> None:
        if done in wanted:
            _snapshot(directory, wanted[done], model)
        if report is not None:
            report(done, steps)

    if not (directory / "model").is_dir():
        # Interrupted while it was measured, with the model in memory alone: such a result is of no
        # use. The last checkpoint, or another training, gives it again.
        (directory / RESULT).unlink(missing_ok=True)
    try:
        result: TrainResult | None = train(config, watch)
        problem = None
    except TrainingInterruptedError:
        raise
    except TrainingError as error:
        result, problem = None, str(error)
    trained = time.perf_counter()
    measured: dict[str, Any] = {"validation": None, "cloze": None}
    if result is not None:
        model, tokenizer = result.model, result.tokenizer
        if model is None:  # finished before, but interrupted before its row was written
            assert result.model_directory is not None
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model, tokenizer = load_trained(result.model_directory, device)
        measured = _evaluate(model, tokenizer, job)
    history = read_history(directory / "metrics.jsonl")
    rates = [row["tokens_per_second"] for row in history if "tokens_per_second" in row]
    return {
        "schema": 1,
        "status": "done" if problem is None else "diverged",
        "problem": problem,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cell": job.cell.to_dict(),
        "config": to_dict(config),
        "evaluation": dataclasses.asdict(job.evaluation),
        "data": data_facts(config),
        "weights": result.linear_weights if result else None,
        "tokens": job.tokens,
        "steps": steps,
        "environment": environment(),
        "seconds": time.perf_counter() - started,
        "train_seconds": trained - started,
        # The first reading holds compilation.
        "tokens_per_second": statistics.median(rates[1:] or rates) if rates else None,
        **measured,
        "history": _history(history, job.tokens // steps),
        "polarization": _read_snapshots(directory),
    }


def data_facts(config: TrainConfig) -> dict[str, Any]:
    """What identifies the tokens: tokenizer, and how many there are in each split."""
    facts: dict[str, Any] = {}
    for path in config.data.mixture or [config.data.path]:
        for split in ("train", "validation"):
            shards = TokenShards(Path(path) / split)
            facts.setdefault(split, []).append(shards.total_tokens)
            facts["tokenizer"] = shards.tokenizer_hash
    return facts


def _evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, job: Job
) -> dict[str, Any]:
    config, evaluation, device = job.config, job.evaluation, model.device.type
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and device == "cuda")
    wanted = Measurements(
        shards=Path(next(iter(config.data.mixture or [config.data.path]))) / "validation",
        cloze=evaluation.cloze_text if tokenizer is not None else None,
        window=job.window,
        stride=job.window,
        limit=evaluation.validation_tokens or None,
        items=evaluation.cloze_questions,
    )
    # Other batch shapes than in training: compiling for them would take longer than they do.
    with (
        torch.autocast(device, torch.bfloat16, enabled=bf16),
        torch.compiler.set_stance("force_eager"),
    ):
        found = dataclasses.asdict(measure(model, cast(Any, tokenizer), wanted))
    return {"validation": found["shards"], "cloze": found["cloze"]}


def check_model(job: Job) -> None:
    """Find out before anything is trained whether patterns and windows fit the model.

    Raises:
        ConfigError: naming the cell and what does not fit.
    """
    model = empty_model(job.config.model.source, 1, torch.float32)  # embeddings of any size
    try:
        convert_model(model, job.config.sparsity)
        check_window(model, job.window)
    except (ConfigError, PatternError) as error:
        raise ConfigError(f"{job.cell}: {error}") from error


def _snapshot(directory: Path, fraction: float, model: PreTrainedModel) -> None:
    snapshot = {"fraction": fraction, "positions": early_and_late(model)}
    append_row(directory / SNAPSHOT_FILE, snapshot)


def _read_snapshots(directory: Path) -> list[dict[str, Any]]:
    """Snapshots by fraction; a step taken twice (after a resume) counts once."""
    rows = read_json_lines(directory / SNAPSHOT_FILE)
    found = {row["fraction"]: row["positions"] for row in rows}
    return [{"fraction": f, **one} for f in sorted(found) for one in found[f]]


def _history(rows: list[dict[str, Any]], tokens_per_step: int) -> dict[str, list[Any]]:
    """Evenly spaced rows of metrics.jsonl, the first and last among them, as columns."""
    rows = [row for row in rows if "loss" in row]
    if len(rows) > POINTS:
        rows = [rows[round(i * (len(rows) - 1) / (POINTS - 1))] for i in range(POINTS)]

    def column(name: str) -> list[Any]:
        values = (row.get(name) for row in rows)
        return [float(f"{v:.5g}") if isinstance(v, float) else v for v in values]

    names = ("loss", "flip_rate", "gradient_norm", "learning_rate", "pattern")
    return {
        "tokens": [row["step"] * tokens_per_step for row in rows],
        "zeros": column("zeros_before_mask"),
        **{name: column(name) for name in names},
    }
