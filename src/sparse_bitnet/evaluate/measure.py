"""Several measurements of one loaded model at once: the verb ``evaluate``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.console import say
from sparse_bitnet.core import ConfigError
from sparse_bitnet.data import TokenShards, open_source
from sparse_bitnet.evaluate.cloze import ClozeAccuracy, cloze_accuracy, cloze_items
from sparse_bitnet.evaluate.harness import evaluate_tasks
from sparse_bitnet.evaluate.perplexity import Perplexity, perplexity
from sparse_bitnet.evaluate.scoring import check_window


@dataclass(frozen=True)
class Measurements:
    """What to measure, and how."""

    shards: Path | None = None  # a directory of token shards, for perplexity
    text: str | None = None  # text, for perplexity: a source such as text:PATH or jsonl:PATH
    cloze: str | None = None  # held-out documents, for cloze accuracy: a source such as jsonl:PATH
    tasks: tuple[str, ...] = ()  # tasks of lm-eval
    include_path: Path | None = None  # a folder of task YAML files, instead of lm-eval's own
    # tokens the model reads at once; give the length that it was trained with. By default it is
    # 1024, or fewer where the model has fewer positions.
    window: int | None = None
    # tokens from one window of a perplexity to the next; by default half a window
    stride: int | None = None
    # windows, candidates or prompts at once; by default chosen by device
    batch_size: int | None = None
    limit: int | None = None  # score at most this many tokens of a perplexity
    items: int | None = None  # ask at most this many cloze items, and as many of each task
    few_shot: int | None = None  # examples in a task's prompt; each task's own number by default
    seed: int = 0  # of the choice of cloze items and their candidates


@dataclass(frozen=True)
class Report:
    """What :func:`measure` found; what was not wanted is None or empty."""

    shards: Perplexity | None = None
    text: Perplexity | None = None
    cloze: ClozeAccuracy | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value}

    def __str__(self) -> str:
        lines = [f"shards: {self.shards}"] if self.shards else []
        lines += [f"text: {self.text}"] if self.text else []
        lines += [str(self.cloze)] if self.cloze else []
        for task, metrics in self.tasks.items():
            for metric, value in metrics.items():
                if "_stderr" not in metric:
                    name, comma, filtered = metric.partition(",")
                    error = metrics.get(f"{name}_stderr{comma}{filtered}")
                    spread = "" if error is None else f" ± {error:.4f}"
                    lines.append(f"{task}: {metric} {value:.4f}{spread}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """Two reports of the same measurements, and how far the first model is from the second."""

    reports: dict[str, Report]  # by the models' names, in order

    @property
    def differences(self) -> dict[str, float]:
        """The first model's figure less the second's: losses in nats a token, or in bits a byte
        where the two cut the text into other tokens, and accuracies."""
        ours, theirs = self.reports.values()
        found: dict[str, float] = {}
        for name in ("shards", "text"):
            a, b = getattr(ours, name), getattr(theirs, name)
            if a is None or b is None:
                continue
            if a.tokens == b.tokens:
                found[f"{name}: nats a token"] = a.loss - b.loss
            elif a.bits_per_byte is not None and b.bits_per_byte is not None:
                found[f"{name}: bits a byte"] = a.bits_per_byte - b.bits_per_byte
        if ours.cloze is not None and theirs.cloze is not None:
            found["cloze accuracy"] = ours.cloze.accuracy - theirs.cloze.accuracy
        for task, metrics in ours.tasks.items():
            for metric, value in metrics.items():
                if "_stderr" not in metric and metric in theirs.tasks.get(task, {}):
                    found[f"{task}: {metric}"] = value - theirs.tasks[task][metric]
        return found

    def as_dict(self) -> dict[str, Any]:
        models = {name: report.as_dict() for name, report in self.reports.items()}
        return {"models": models, "differences": self.differences}

    def __str__(self) -> str:
        lines = [f"{name}\n{report}" for name, report in self.reports.items()]
        lines.append("the first less the second")
        lines += [f"{name} {value:+.4f}" for name, value in self.differences.items()]
        return "\n".join(lines)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Measurements
) -> Report:
    """Measure a loaded model: perplexity, cloze accuracy, lm-eval tasks, whatever is wanted.

    Every source is opened before the first measurement, so that a wrong path fails at once.

    Raises:
        ConfigError: if nothing is wanted, or an option is out of range.
        DataError: for shards, text or tasks that are missing, damaged or of another vocabulary.
        MissingExtraError: if tasks are wanted and lm-eval is not installed.
    """
    if wanted.shards is None and not (wanted.text or wanted.cloze or wanted.tasks):
        raise ConfigError("nothing to measure: give --shards, --text, --cloze or --tasks")
    shards = None if wanted.shards is None else TokenShards(wanted.shards)
    text = open_source(wanted.text) if wanted.text else None
    documents = open_source(wanted.cloze) if wanted.cloze else None
    window = check_window(model, wanted.window)
    if wanted.window is None:
        say(
            f"windows of {window:,} tokens; --window takes the length that a model was trained with"
        )
    sizes: dict[str, Any] = {"window": window, "batch_size": wanted.batch_size}
    found: dict[str, Any] = {}
    for name, source in (("shards", shards), ("text", text)):
        if source is not None:
            found[name] = perplexity(
                model,
                source,
                tokenizer=tokenizer,
                stride=wanted.stride,
                limit=wanted.limit,
                title=f"perplexity of {name}",
                **sizes,
            )
    if documents is not None:
        items = cloze_items(documents, limit=wanted.items, seed=wanted.seed)
        found["cloze"] = cloze_accuracy(model, tokenizer, items, **sizes)
    if wanted.tasks:
        found["tasks"] = evaluate_tasks(
            model,
            tokenizer,
            wanted.tasks,
            include_path=wanted.include_path,
            few_shot=wanted.few_shot,
            limit=wanted.items,
            **sizes,
        )
    return Report(**found)
