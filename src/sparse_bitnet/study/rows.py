"""``rows.jsonl``: one line for each finished cell, all that a report needs (:class:`Row`) and more.

Lines are appended whole and synced, so an interruption costs at most the line being written. A
reader skips and reports what it cannot use; it takes ``rows.jsonl.xz`` as well.
"""

from __future__ import annotations

import json
import lzma
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, BeforeValidator, ConfigDict, FiniteFloat, with_config
from pydantic_core import to_json
from typing_extensions import TypedDict

from sparse_bitnet.core import DataError
from sparse_bitnet.files import writing
from sparse_bitnet.study.cells import Cell
from sparse_bitnet.train.recipe import checked

ROWS_FILE = "rows.jsonl"
FOREIGN = ConfigDict(extra="ignore", coerce_numbers_to_str=True)


def _bins_fit(one: dict[str, Any]) -> dict[str, Any]:
    bins = len(one["magnitudes"])
    if len(one["edges"]) != bins + 1 or len(one.get("thresholds", [])) not in (0, bins):
        raise ValueError("edges, magnitudes and thresholds are not of one number of bins")
    return one


class _Bins(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    fraction: FiniteFloat  # of training
    position: str  # early, late or all
    edges: list[FiniteFloat]
    magnitudes: list[FiniteFloat]
    thresholds: NotRequired[list[FiniteFloat]]


def _known(cell: Any) -> Any:
    """Without what a later version may have added."""
    return {k: v for k, v in cell.items() if k in Cell.__dataclass_fields__}


@with_config(FOREIGN)
@dataclass(frozen=True)
class Row:
    """A finished cell."""

    raw: dict[str, Any]  # everything the line holds
    key: str  # see cells.run_key
    cell: Annotated[Cell, BeforeValidator(_known)]
    validation: dict[str, float | None] = field(default_factory=dict)
    cloze: dict[str, float] = field(default_factory=dict)
    history: dict[str, list[float | str | None]] = field(default_factory=dict)
    polarization: list[Annotated[_Bins, AfterValidator(_bins_fit)]] = field(default_factory=list)
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    tokens: FiniteFloat | None = None
    seconds: FiniteFloat | None = None
    tokens_per_second: FiniteFloat | None = None

    @property
    def perplexity(self) -> float:
        """On the validation split; NaN if training diverged."""
        found = self.validation.get("perplexity")
        return math.nan if found is None else found

    @property
    def accuracy(self) -> float | None:
        """Of the cloze, a fraction; None if it was not measured."""
        return self.cloze.get("accuracy")

    @property
    def learning_rate(self) -> float | None:
        """The highest of its schedule; None if the row does not record it."""
        rate: float | None = self.config.get("optimizer", {}).get("learning_rate")
        return self.cell.learning_rate if rate is None else rate

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.perplexity)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(tokens, values) of a history, without the points where nothing was measured."""
        both = zip(self.history.get("tokens", []), self.history.get(name, []), strict=False)
        pairs = [
            (t, v)
            for t, v in both
            if isinstance(t, float) and isinstance(v, float) and math.isfinite(t + v)
        ]
        return [t for t, _ in pairs], [v for _, v in pairs]

    @property
    def zeros(self) -> float | None:
        """Fraction of weights that round to zero before any mask, at the end of training."""
        _, values = self.series("zeros")
        return values[-1] if values else None


def read_rows(path: str | Path) -> tuple[list[Row], list[str]]:
    """Rows of a file (or of ``rows.jsonl`` in a directory), and what was wrong with the others.

    A key that comes twice counts once, by its last line.

    Raises:
        DataError: if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ROWS_FILE
        packed = path.with_name(f"{path.name}.xz")
        path = packed if packed.is_file() and not path.is_file() else path
    if not path.is_file():
        raise DataError(f"{path}: no such file; a sweep writes it, see `sparse-bitnet sweep`")
    data = path.read_bytes()
    if path.suffix == ".xz":
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise DataError(f"{path}: damaged: {error}") from error
    rows: dict[str, Row] = {}
    problems = []
    for number, line in enumerate(data.decode("utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            known = {name: value for name, value in raw.items() if value is not None}
            row = checked(Row, known | {"raw": raw}, "")
        except Exception as error:  # whatever a foreign line brings
            problems.append(f"{path.name}, line {number}: skipped, {str(error)[:300]}")
            continue
        rows[row.key] = row
    return list(rows.values()), problems


def append_row(path: str | Path, row: dict[str, Any]) -> None:
    """Append one line and sync it. Not finite becomes null, which every JSON reader knows.

    A line that an earlier crash left half written is closed first, so it spoils only itself.

    Raises:
        OutputError: if it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = to_json(row, inf_nan_mode="null") + b"\n"
    # Such a file is written at its end, wherever it is read.
    with writing(path), path.open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read(1) not in (b"", b"\n"):
            data = b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
