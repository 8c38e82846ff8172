"""Training metrics of a ternary model besides its loss: flip rate, zeros, dead weights.

- **Flip rate**: the fraction of mask entries that one optimizer step changes, over all masked
  weights. High early, falling as the masks settle.
- **Zeros before the mask**: the fraction of weights that would round to zero with no mask at all
  (|w| ≤ γ/2). Where it exceeds (M − N)/M, a mask has little left to remove.
- **Dead**: the fraction of weights that every one of the last hundred readings found zero, masked
  or rounded: capacity that the model does not use.

They read every master weight, so they are taken at logging steps only, with one synchronisation.
Sharded weights are gathered first, so figures are those of the whole weight.

Dead weights need a memory: one bit a weight (of the sixteen bytes that training takes), spread over
the ranks where weights are sharded. It is no part of a checkpoint: a window of readings that a
resumed run has not seen from its beginning is not reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from sparse_bitnet.core import (
    MissingExtraError,
    Pattern,
    absmean,
    method_mask,
    round_ternary,
    row_scale,
)
from sparse_bitnet.files import read_json_lines, write_text, writing
from sparse_bitnet.nn import MasterWeight, master_weights
from sparse_bitnet.nn.derived import whole

WINDOW = 100  # readings in which a dead weight is never non-zero


@dataclass(frozen=True)
class Figures:
    """Of one master weight, or of all of a model."""

    flip_rate: float | None  # None where no mask is in force, or none was before the step
    zeros_before_mask: float
    dead: float | None  # None but at the end of a window


@dataclass(frozen=True)
class Reading(Figures):
    """The figures of a model, and of each of its master weights by name."""

    layers: dict[str, Figures]


class Monitor:
    """Measure a converted model around one optimizer step.

    Call :meth:`before_step`, let the optimizer step, then :meth:`after_step`. Under FSDP2 every
    rank must call both.

    Args:
        readings: taken before, by the process whose run this one resumes.
    """

    def __init__(self, model: nn.Module, readings: int = 0) -> None:
        self._model = model
        self._masks: dict[str, Tensor | None] = {}
        self._readings = readings
        # Which weights were ever non-zero in this window: by index, bits [⌈size / 8⌉]. None if a
        # part of the window went unseen, or under another pattern.
        self._alive: dict[int, Tensor] | None = None
        self._patterns: list[Pattern] = []

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember the masks: one byte a weight, until :meth:`after_step`."""
        self._masks = {weight.name: weight.mask for weight in master_weights(self._model)}

    @torch.no_grad()
    def after_step(self) -> Reading:
        """Compare with the remembered masks (if any) and count zeros. Synchronises once."""
        weights = list(master_weights(self._model))
        patterns = [weight.pattern for weight in weights]
        if self._readings % WINDOW == 0:
            self._alive, self._patterns = {}, patterns
        elif patterns != self._patterns:
            self._alive = None
        self._readings += 1
        flips, zeros, dead, masked = [], [], [], []
        for index, one in enumerate(weights):
            weight, before = whole(one.weight), self._masks.get(one.name)
            mask = method_mask(weight, one.pattern, one.module.method, one.shard_sizes)
            flips.append(torch.zeros((), dtype=torch.int64, device=weight.device))
            masked.append(0 if before is None or mask is None else weight.numel())
            if before is not None and mask is not None:
                flips[-1] = before.ne(mask).sum()
            zeros.append((weight.abs() <= _scale(one, weight) / 2).sum())
            dead.append(self._count_dead(index, one, weight, mask))
        self._masks = {}
        counts = torch.stack([*map(torch.stack, (flips, zeros, dead))])
        ends = self._ends_window()
        if ends and _sharing(self._model)[1] > 1:
            dist.all_reduce(counts[2])

        def figures(flipped: int, zero: int, unused: int, masked: int, size: int) -> dict[str, Any]:
            flips = flipped / masked if masked else None
            dead = unused / size if ends else None
            return {"flip_rate": flips, "zeros_before_mask": zero / size, "dead": dead}

        columns = [*counts.tolist(), masked, [one.weight.numel() for one in weights]]
        layers = {
            one.name: Figures(**figures(*numbers))
            for one, *numbers in zip(weights, *columns, strict=True)
        }
        return Reading(**figures(*map(sum, columns)), layers=layers)

    def _ends_window(self) -> bool:
        return self._alive is not None and self._readings % WINDOW == 0

    def _count_dead(
        self, index: int, one: MasterWeight, weight: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Note which weights are non-zero now; the count of those that never were in the window,
        once it ends, on the rank that keeps this weight."""
        none = torch.zeros((), dtype=torch.int64, device=weight.device)
        rank, world_size = _sharing(self._model)
        if self._alive is None or index % world_size != rank:
            return none
        flags = _nonzero(one, weight, mask).flatten()
        bits = functional.pad(flags, (0, -len(flags) % 8)).unflatten(0, (-1, 8))
        place = torch.arange(8, dtype=torch.uint8, device=weight.device)
        alive = (bits.to(torch.uint8) << place).sum(-1, dtype=torch.uint8)
        if index in self._alive:
            alive |= self._alive[index]
        self._alive[index] = alive
        return (
            len(flags) - (alive.unsqueeze(-1) >> place & 1).sum() if self._ends_window() else none
        )


def _scale(one: MasterWeight, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """γ of every row, of the kept weights alone with a mask: ``[..., out, 1]``."""
    scale = absmean(weight, one.shard_sizes, mask)
    return row_scale(scale, one.shard_sizes, weight.shape[-2]).unsqueeze(-1)


def _nonzero(one: MasterWeight, weight: Tensor, mask: Tensor | None) -> Tensor:
    """Which weights the model computes with: kept by the mask, and not rounded to zero."""
    flags = weight != 0
    if one.module.is_ternary:
        kept = mask if one.module.method.order == "mask-then-quant" else None
        flags = round_ternary(weight, _scale(one, weight, kept)) != 0
    return flags if mask is None else flags & mask


def _sharing(model: nn.Module) -> tuple[int, int]:
    """Rank and number of the processes that share the memory of a model's weights."""
    sharded = any(isinstance(weight.weight, DTensor) for weight in master_weights(model))
    return (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)


class History:
    """``metrics.jsonl``: one JSON object a row, appended at once; TensorBoard events if configured.

    Continuing a run drops the rows after the step it resumes from, so every step stands there once.
    With ``writes`` off (ranks other than the first) nothing is touched. ``rows`` is how many the
    file has, ``last`` the figures of the newest step that has any, all its rows together.

    Raises:
        MissingExtraError: if TensorBoard is asked for and not installed.
    """

    def __init__(
        self, directory: Path, first_step: int, tensorboard: bool, writes: bool = True
    ) -> None:
        self._file, self._board = None, None
        self.rows, self.last = 0, dict[str, Any]()
        if not writes:
            return
        if tensorboard:
            self._board = _tensorboard(directory / "tensorboard", first_step)
        self._path = directory / "metrics.jsonl"
        kept = [row for row in read_history(self._path) if row["step"] <= first_step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")
        for row in kept:
            self._count(row)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; it must have a ``step``.

        Raises:
            OutputError: if it cannot be written.
        """
        self._count(row)
        if self._file is not None:
            with writing(self._path):
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, row["step"])
            for layer, figures in row.get("layers", {}).items():
                for name, value in figures.items():
                    if value is not None:
                        self._board.add_scalar(f"{name}/{layer}", value, row["step"])

    def sync(self) -> None:
        """Bring the rows to the disk: before each checkpoint, so that none of them outlives its
        rows when the machine stops."""
        if self._file is not None:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            with writing(self._path):
                self._file.close()
        if self._board is not None:
            self._board.close()

    def _count(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.last = (self.last if self.last.get("step") == row["step"] else {}) | row


class Clock:
    """Tokens a second between two readings, without validation and saving."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._started = self._last = time.perf_counter()
        self._paused, self._steps = 0.0, 0

    def tick(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        busy = max(1e-9, now - self._last - self._paused)
        rate = self._steps * self._tokens_per_step / busy
        self._last, self._paused, self._steps = now, 0.0, 0
        return {"tokens_per_second": rate, "seconds": now - self._started}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line that a crash cut short is left out."""
    return [row for row in read_json_lines(path) if isinstance(row.get("step"), int)]


def _tensorboard(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "run.tensorboard needs TensorBoard: pip install 'sparse-bitnet[track]'"
        ) from error
    return SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else None)
