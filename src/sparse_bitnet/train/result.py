"""A run directory: its lock, its configuration, and the result once the run is done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.console import say
from sparse_bitnet.core import ConfigError
from sparse_bitnet.files import locked, read_json, remove_leftovers, write_text
from sparse_bitnet.train.config import TrainConfig
from sparse_bitnet.train.export import check_trained_output
from sparse_bitnet.train.monitor import read_history
from sparse_bitnet.train.parallel import Ranks
from sparse_bitnet.train.recipe import differences, digest, load_recipe, to_yaml

CONFIG, RESULT, HISTORY, LOCK = "config.yaml", "result.json", "metrics.jsonl", ".lock"
PATIENCE = 10.0  # seconds: a worker whose sweep was killed notices after its step


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; all but ``model`` and ``tokenizer`` also stands in ``result.json``."""

    directory: Path
    steps: int  # and tokens: of the whole run
    tokens: int
    loss: float | None  # of the last step, nats a token; None if metrics.jsonl lost its row
    validation_loss: float | None  # nats a token; None without a split
    seconds: float  # of the last process, compilation and validation included
    linear_weights: int  # that were converted
    history: Path  # metrics.jsonl
    model_directory: Path | None  # None if run.export is off
    checkpoint: Path | None  # the last one
    reused: bool = False  # finished before: nothing was trained
    # In evaluation mode, sharded if there are many ranks; None if reused (load_trained reads it).
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None  # of the data; None if reused

    @property
    def perplexity(self) -> float | None:
        """exp of the validation loss, per token."""
        return None if self.validation_loss is None else math.exp(self.validation_loss)

    def __str__(self) -> str:
        lines = {
            "steps": f"{self.steps:,} ({self.tokens:,} tokens)",
            "loss": self.loss and f"{self.loss:.4f} nats a token at the last step",
            "validation": self.validation_loss
            and f"{self.validation_loss:.4f} nats a token, perplexity {self.perplexity:.2f}",
            "metrics": self.history,
            "checkpoint": self.checkpoint,
            "model": self.model_directory,
        }
        return "\n".join(f"{name:10}  {text}" for name, text in lines.items() if text is not None)


_PLAIN = ("steps", "tokens", "loss", "validation_loss", "seconds", "linear_weights")


def facts(result: TrainResult) -> dict[str, Any]:
    """The figures of a result, without paths."""
    return {name: getattr(result, name) for name in _PLAIN}


@contextmanager
def owned(directory: Path, here: Ranks) -> Iterator[None]:
    """Keep other processes from training in a directory, and remove what killed ones left there.

    Raises:
        ConfigError: on every rank, if another process trains there.
    """
    busy = ConfigError(
        f"{directory}: another process is training there; wait for it to end, or choose another "
        "run.directory"
    )
    with ExitStack() as stack:
        refused = False
        if here.is_main:
            try:
                stack.enter_context(locked(directory / LOCK, busy, PATIENCE))
                for place in (directory, directory / "checkpoints"):
                    for name in remove_leftovers(place):
                        say(f"removed {place / name}, which a killed process left unfinished")
            except ConfigError:
                refused = True
        if here.any(refused):
            raise busy
        yield


def claim(directory: Path, config: TrainConfig, here: Ranks) -> TrainResult | None:
    """Make the directory this run's, or recognise it; return its result if it is done.

    A run of another configuration that came to nothing (a pattern that did not fit, a missing file)
    gives way.

    Raises:
        ConfigError: if the directory holds a run of another configuration, or a ``model`` that no
            run wrote.
    """
    path = directory / CONFIG
    if path.is_file() and _came_to_something(directory):
        changed = differences(load_recipe(path), config)
        if changed:
            raise ConfigError(
                f"{directory} holds another run: {'; '.join(changed)}. Choose another "
                "run.directory, or remove this one"
            )
    finished = _finished(directory, config)
    if finished is None and config.run.export:  # asked now, and not when the training is done
        check_trained_output(directory / "model")
        if (directory / "model").exists() and not path.exists():
            raise ConfigError(
                f"{directory / 'model'} was not written by a run in {directory} (there is no "
                f"{CONFIG}) and would be replaced; choose another run.directory, or move it away"
            )
    here.wait()  # until all have read what the main process writes next
    if here.is_main:
        write_text(path, to_yaml(config))
    return finished


def _finished(directory: Path, config: TrainConfig) -> TrainResult | None:
    done = directory / RESULT
    model = directory / "model"
    if not done.is_file() or (config.run.export and not model.is_dir()):
        return None
    try:
        values = read_json(done)
        if values["config_digest"] != digest(config):
            return None
        figures = {name: values[name] for name in _PLAIN}
        checkpoint = None if values["checkpoint"] is None else directory / values["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged; the last checkpoint gives the same result again
    return TrainResult(
        directory=directory,
        **figures,
        history=directory / HISTORY,
        model_directory=model if model.is_dir() else None,
        checkpoint=checkpoint,
        reused=True,
    )


def _came_to_something(directory: Path) -> bool:
    """Whether a run took steps that are worth keeping."""
    begun = any((directory / name).is_dir() for name in ("model", "checkpoints"))
    return begun or (directory / RESULT).is_file() or bool(read_history(directory / HISTORY))


def write_result(result: TrainResult, config: TrainConfig, here: Ranks) -> None:
    """Write ``result.json``: the figures, and what ran them."""
    checkpoint = result.checkpoint
    if here.is_main:
        values = {
            **facts(result),
            "checkpoint": None if checkpoint is None else f"checkpoints/{checkpoint.name}",
            "config_digest": digest(config),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": device_name(here.device),
            "ranks": here.world_size,
        }
        write_text(result.directory / RESULT, json.dumps(values, indent=1))


def device_name(device: torch.device) -> str:
    """``cpu``, or the GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
