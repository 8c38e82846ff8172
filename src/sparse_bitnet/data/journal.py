"""Journal of a data preparation: its settings and finished parts, in ``OUT/prepare.json``.

The journal makes a run resumable and a finished one recognisable. It is rewritten atomically after
each part, when the part's files already lie in place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict, with_config

from sparse_bitnet.core.errors import DataError, shown
from sparse_bitnet.data.shards import FORBID, Shard, validated
from sparse_bitnet.files import locked, read_json, refuse_special, remove_leftovers, write_text

JOURNAL = "prepare.json"
LOCK = "prepare.lock"
FORMAT = "sparse-bitnet data prepare"
VERSION = 1
TRAIN, VALIDATION, TOKENIZER = "train", "validation", "tokenizer"
Split = Annotated[str, Field(pattern="^(train|validation)$")]
Read = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]


@with_config(FORBID)
@dataclass(frozen=True)
class Part:
    """Consecutive documents of one source, finished."""

    source: Annotated[int, Field(strict=True, ge=0, le=1)]  # 1: the separate validation source
    documents: Read  # from that source up to the end of this part, all its parts together
    bytes: Read
    shards: dict[Split, Shard]  # the files it filled


@with_config(FORBID)
@dataclass
class Journal:
    """The settings of a preparation, its tokenizer once that is written, and its finished parts."""

    settings: dict[str, Any]
    tokenizer_hash: str | None = None
    finished: Annotated[bool, Strict()] = False
    parts: list[Part] = field(default_factory=list)

    def save(self, out: Path) -> None:
        state = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_text(out / JOURNAL, json.dumps(state, indent=1) + "\n")

    def shards(self, split: str) -> list[Shard]:
        """The finished files of a split, in order."""
        return [part.shards[split] for part in self.parts if split in part.shards]


@contextmanager
def open_journal(out: Path, settings: dict[str, Any], overwrite: bool) -> Iterator[Journal]:
    """The journal of ``out`` to go on with, a new one where there is none; locked until the end.

    Raises:
        DataError: if ``out`` was prepared with other settings (each is named), is damaged, holds
            foreign files, or is being prepared by another process.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; name a directory")
    if out.exists() and not (out / JOURNAL).exists():
        foreign = [p.name for p in out.iterdir() if not p.name.startswith((JOURNAL, LOCK))]
        if foreign:
            raise DataError(
                f"{out}: holds {sorted(foreign)[0]}, which data preparation did not write; name an "
                "empty or a new directory"
            )
    try:
        refuse_special(*out.rglob("*"))
    except ValueError as error:
        raise DataError(f"{error}; remove it") from None
    busy = DataError(f"{out}: another run is preparing it; wait for it to end")
    with locked(out / LOCK, busy):
        if overwrite:
            discard(out)
        for directory in (out, out / TRAIN, out / VALIDATION):
            remove_leftovers(directory)
        journal = _load(out)
        if journal is None or (not journal.parts and journal.settings != settings):
            discard(out)  # of other settings, but nothing that would be lost
            journal = Journal(settings)
            journal.save(out)
        _refuse_other(journal.settings, settings, out)
        yield journal


def discard(out: Path) -> None:
    """Remove everything that preparing wrote, but for the lock."""
    (out / JOURNAL).unlink(missing_ok=True)
    for name in (TOKENIZER, TRAIN, VALIDATION):
        shutil.rmtree(out / name, ignore_errors=True)


def _load(out: Path) -> Journal | None:
    path = out / JOURNAL
    if not path.exists():
        return None
    try:
        state = read_json(path)
        if (state.pop("format"), state.pop("version")) != (FORMAT, VERSION):
            raise ValueError("not written by this version")
        journal: Journal = validated(Journal, state)
        return journal
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: damaged or of another version ({str(error)[:300]}); prepare again with "
            "--overwrite"
        ) from error


def _refuse_other(there: dict[str, Any], asked: dict[str, Any], out: Path) -> None:
    differ = [key for key in asked if there.get(key) != asked[key]]
    if differ:
        named = "; ".join(
            f"{key} was {shown(there.get(key))}, now {shown(asked[key])}" for key in differ
        )
        raise DataError(
            f"{out}: holds data prepared otherwise: {named}. Name another directory, or prepare "
            "with --overwrite"
        )
