"""What one wants to see of a ternary model in training, besides its loss.

- **Flip rate**: the fraction of mask entries that one optimizer step changes, over all masked
  weights. High early, falling as the masks settle.
- **Zeros before the mask**: the fraction of weights that would round to zero with no mask at all
  (|w| ≤ γ/2). Where it exceeds (M − N)/M, a mask has little left to remove.

Both read every master weight, so they are taken at logging steps only. Weights of one shape are
stacked and measured together: a hundred small matrices cost a handful of kernels and a single
synchronisation. Sharded weights are gathered first, so figures are those of the whole weight.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.core import Method, MissingExtraError, Pattern, absmean, method_mask, row_scale
from sparse_bitnet.files import write_text
from sparse_bitnet.nn import MasterWeight, master_weights
from sparse_bitnet.nn.derived import whole

ELEMENTS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Layer:
    """One master weight's figures; ``flip_rate`` is None if it is dense or was not measured."""

    flip_rate: float | None
    zeros: float
    size: int


@dataclass(frozen=True)
class Reading:
    """The figures of a model, by name of the master weight."""

    layers: dict[str, Layer]

    @property
    def zeros(self) -> float:
        """Zeros before the mask, over all converted weights."""
        sizes = sum(layer.size for layer in self.layers.values())
        return sum(layer.zeros * layer.size for layer in self.layers.values()) / max(1, sizes)

    @property
    def flip_rate(self) -> float | None:
        """Over all masked weights; None if no mask is in force."""
        masked = [x for x in self.layers.values() if x.flip_rate is not None]
        if not masked:
            return None
        flips = sum((x.flip_rate or 0.0) * x.size for x in masked)
        return flips / sum(x.size for x in masked)


class Monitor:
    """Measure a converted model around one optimizer step.

    Call :meth:`before_step`, let the optimizer step, then :meth:`after_step`. Under FSDP2 every
    rank must call both.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._masks: list[Tensor | None] | None = None

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember the masks: one byte a weight, until :meth:`after_step`."""
        self._masks = [
            method_mask(stack, batch.pattern, batch.method, batch.segments)
            for batch, stack in _batches(self._model)
        ]

    @torch.no_grad()
    def after_step(self) -> Reading:
        """Compare with the remembered masks (if any) and count zeros. Synchronises once."""
        names: list[tuple[str, int, bool]] = []
        flips, zeros = [], []
        for index, (batch, stack) in enumerate(_batches(self._model)):
            before = self._masks[index] if self._masks is not None else None
            after = None
            if before is not None:
                after = method_mask(stack, batch.pattern, batch.method, batch.segments)
            if before is not None and after is not None:
                flips.append((before != after).flatten(1).sum(1))
            else:
                flips.append(torch.zeros(len(stack), dtype=torch.int64, device=stack.device))
            rows = row_scale(absmean(stack, batch.segments), batch.segments, stack.shape[-2])
            zeros.append((stack.abs() <= rows.unsqueeze(-1) / 2).flatten(1).sum(1))
            names += [(name, stack[0].numel(), after is not None) for name in batch.names]
        self._masks = None
        counts = torch.stack([torch.cat(flips), torch.cat(zeros)]).tolist()
        layers = {
            name: Layer(flipped / size if masked else None, zero / size, size)
            for (name, size, masked), flipped, zero in zip(names, *counts, strict=True)
        }
        order = [weight.name for weight in master_weights(self._model)]
        return Reading({name: layers[name] for name in order})


@dataclass(frozen=True)
class _Batch:
    names: list[str]
    pattern: Pattern
    method: Method
    segments: tuple[int, ...]


def _batches(model: nn.Module) -> Iterator[tuple[_Batch, Tensor]]:
    """Master weights stacked ``[count, …, out, in]`` where shape, pattern and method are equal."""
    groups: dict[Any, list[MasterWeight]] = {}
    for weight in master_weights(model):
        key = (weight.weight.shape, weight.pattern, weight.module.method, weight.segments)
        groups.setdefault(key, []).append(weight)
    for (shape, pattern, method, segments), members in groups.items():
        count = max(1, ELEMENTS_AT_ONCE // max(1, shape.numel()))
        for start in range(0, len(members), count):
            part = members[start : start + count]
            stack = torch.stack([whole(weight.weight) for weight in part])
            yield _Batch([weight.name for weight in part], pattern, method, segments), stack


class History:
    """``metrics.jsonl``: one JSON object a row, appended at once; TensorBoard events if configured.

    Continuing a run drops the rows after the step it resumes from, so every step stands there once.
    With ``writes`` off (ranks other than the first) nothing is touched.

    Attributes:
        rows: how many the file has.
        last: figures of the newest step that has any, all its rows together.

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
        path = directory / "metrics.jsonl"
        kept = [row for row in read_history(path) if row["step"] <= first_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        for row in kept:
            self._count(row)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; it must have a ``step``."""
        self._count(row)
        if self._file is not None:
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
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the files."""
        if self._file is not None:
            self.sync()
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _count(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.last = (self.last if self.last.get("step") == row["step"] else {}) | row


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line that a crash cut short is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def _tensorboard(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "run.tensorboard needs TensorBoard: pip install 'sparse-bitnet[track]'"
        ) from error
    return SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else None)
