"""Resumable checkpoints: sharded over ranks, complete or absent, verified when loaded.

PyTorch's distributed checkpoint (DCP) plans which rank writes and reads which part of which tensor,
so a run may continue on another number of ranks. Its own files are pickles (``.metadata``, and
``torch.save`` around every tensor), and a pickle runs code when it is opened. DCP also has a
safetensors backend, made for Hugging Face: the same plans, tensors in safetensors files, offsets of
the shards in their JSON headers. That one is used here, so nothing is unpickled. What is no tensor
stands in ``checkpoint.json``:

    step-00000100/
        shard-00001-model-00001-of-00001.safetensors    one for each rank: weights and both moments
        checkpoint.json                                 step, config, data, size and crc of the rest

A checkpoint is written under a temporary name, synced, and renamed; ``checkpoint.json`` comes last.
So a name that exists is complete, unless somebody damaged it, which sizes and checksums tell.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim import Optimizer
from transformers import PreTrainedModel

from sparse_bitnet.core import CheckpointError, ConfigError, OutputError
from sparse_bitnet.files import (
    TEMPORARY_SUFFIX,
    atomic_directory,
    read_json,
    write_text,
    writing,
)
from sparse_bitnet.nn.shards import plain
from sparse_bitnet.train.checksums import checksums, find_damage
from sparse_bitnet.train.config import TrainConfig
from sparse_bitnet.train.parallel import Ranks
from sparse_bitnet.train.recipe import config_from_dict, differences, to_dict

FORMAT = 1
MANIFEST = "checkpoint.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. Every rank must call every method."""

    directory: Path  # holds step-00000100 and so on
    keep: int  # how many of the last ones stay
    config: TrainConfig  # of the run; a checkpoint of another one is refused
    data: dict[str, Any]  # what identifies the tokens (Batches.fingerprint)
    ranks: Ranks

    def save(self, step: int, model: PreTrainedModel, optimizer: Optimizer, rows: int = 0) -> Path:
        """Write ``step-N`` with the state after ``step`` steps, then drop those beyond ``keep``.

        Args:
            rows: of metrics.jsonl that belong to these steps; :meth:`load` returns it.

        Raises:
            OutputError: if it cannot be written; says where the run can go on. Earlier ones stay.
            CheckpointError: if DCP fails otherwise.
        """
        target = self.path(step)
        try:
            self._write(target, step, model, optimizer, rows)
        except OutputError as error:
            last = self.newest()
            begin = f"goes on from {last}" if last else "begins anew"
            raise OutputError(f"{error}. After that the same command {begin}") from error
        except Exception as error:  # DCP's own
            raise CheckpointError(f"checkpoint {target} cannot be written: {error}") from error
        if self.ranks.is_main:
            for old in self.steps()[self.keep :]:
                _remove(self.path(old))
        self.ranks.wait()
        return target

    def _write(
        self, target: Path, step: int, model: PreTrainedModel, optimizer: Optimizer, rows: int
    ) -> None:
        main = self.ranks.is_main
        # Ranks write below what links of the target lead to.
        with atomic_directory(target) if main else writing(Path(os.path.realpath(target))) as own:
            temporary = Path(self.ranks.from_main(str(own)))
            with _dcp():
                dcp.save(
                    _tensors(model, optimizer),
                    storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
                    no_dist=not self.ranks.is_distributed,
                )
            self.ranks.wait()
            files = sorted(path.name for path in temporary.iterdir())
            manifest = {
                "format": FORMAT,
                "step": step,
                "ranks": self.ranks.world_size,
                "config": to_dict(self.config),
                "data": self.data,
                "rows": rows,
                "files": self._checksums(temporary, files),
            }
            if main:
                write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))

    def load(self, step: int, model: PreTrainedModel, optimizer: Optimizer) -> int:
        """Fill model and optimizer with the state after ``step`` steps.

        Returns:
            How many rows metrics.jsonl had when it was saved; 0 in those of version 0.1.

        Raises:
            CheckpointError: if the checkpoint is damaged or belongs to another run; names another
                one, if there is.
        """
        path = self.path(step)
        manifest = self._manifest(step)
        self._check_same_run(path, manifest)
        if damage := find_damage(path, manifest["files"], partial(self._checksums, path)):
            raise CheckpointError(f"checkpoint {path} is damaged: {damage}; {self._way_out(step)}")
        try:
            with _dcp():
                dcp.load(
                    _tensors(model, optimizer),
                    storage_reader=HuggingFaceStorageReader(str(path)),
                    no_dist=not self.ranks.is_distributed,
                )
        except Exception as error:  # of a file that changes meanwhile, or of another shape
            raise CheckpointError(
                f"checkpoint {path} does not fit this model: {error}; {self._way_out(step)}"
            ) from error
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["step"].fill_(step)
        rows: int = manifest.get("rows", 0)
        return rows

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return next(iter(self.steps()), None)

    def newest(self) -> Path | None:
        """Where that one stands."""
        step = self.latest()
        return None if step is None else self.path(step)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints (those with a manifest), newest first."""
        found = []
        for path in self.directory.glob("step-*"):
            match = re.fullmatch(r"step-(\d{8,})", path.name)
            if match and (path / MANIFEST).is_file():
                found.append(int(match[1]))
        return sorted(found, reverse=True)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.directory / f"step-{step:08d}"

    def _manifest(self, step: int) -> dict[str, Any]:
        path = self.path(step) / MANIFEST
        try:
            manifest: dict[str, Any] = read_json(path)
            if (
                (manifest["format"], manifest["step"]) == (FORMAT, step)
                and {"config", "data"} <= manifest.keys()
                and isinstance(manifest["files"], dict)
                and type(manifest.get("rows", 0)) is int
            ):
                return manifest
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        raise CheckpointError(
            f"checkpoint {path.parent} is damaged or foreign: {MANIFEST} is not that of a "
            f"checkpoint of step {step}; {self._way_out(step)}"
        )

    def _check_same_run(self, path: Path, manifest: dict[str, Any]) -> None:
        try:
            theirs = config_from_dict(manifest["config"], f"{path / MANIFEST}")
        except ConfigError as error:
            raise CheckpointError(f"checkpoint {path} is foreign: {error}") from error
        changed = differences(theirs, self.config)
        if manifest["data"] != self.data:
            changed.append("the data has changed")
        if changed:
            raise CheckpointError(
                f"checkpoint {path} belongs to another run: {'; '.join(changed)}. Go back to "
                "those values, or choose another run.directory"
            )

    def _checksums(self, directory: Path, names: list[str]) -> dict[str, list[int]]:
        """Ranks share the reading."""
        mine = names[self.ranks.rank :: self.ranks.world_size]
        parts = self.ranks.gather(checksums(directory, mine))
        return {name: mark for part in parts for name, mark in sorted(part.items())}

    def _way_out(self, bad: int) -> str:
        """What to do instead of using checkpoint ``bad``."""
        others = [self.path(step) for step in self.steps() if step != bad]
        return f"remove it to resume at {others[0]}" if others else "remove it to start over"


def _tensors(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """All that a step changes, by name; tied weights once. DCP reads into these very tensors."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            tensors[f"model.{name}"] = plain(value.detach())
    for name, p in model.named_parameters():
        for moment in MOMENTS:
            if p in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[p][moment]
    return tensors


@contextlib.contextmanager
def _dcp() -> Iterator[None]:
    """Raise what DCP met: it wraps the errors of all ranks in a BaseException."""
    with warnings.catch_warnings():
        # It warns that it "assumes" a single process, also with no_dist.
        warnings.filterwarnings("ignore", message=".*single process")
        try:
            yield
        except dcp.CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from error


def _remove(path: Path) -> None:
    """Under a temporary name first, so that half a removal is not taken for a checkpoint."""
    doomed = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
