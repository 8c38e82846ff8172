"""``rows.jsonl``: one line for each finished cell, all that a report needs.

A row holds the cell and its whole configuration, versions and device, wall time and speed, the
final figures, and histories thinned to a few hundred points:

    key, finished, status, cell, blocks, config, data, weights, tokens, steps
    environment: python, torch, …, device, commit
    seconds, train_seconds, tokens_per_second
    validation: {loss, perplexity, tokens}
    cloze: {accuracy, questions} or null
    history: {tokens: [...], loss: [...], zeros: [...], flip_rate: [...], pattern: [...]}
    polarization: [{fraction, position, name, magnitudes, thresholds, ...}, ...]

Lines are appended whole and synced, so an interruption costs at most the line being written; a
reader skips what it cannot use and reports it. A directory may hold ``rows.jsonl.xz`` instead,
which is only read.
"""

from __future__ import annotations

import json
import lzma
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pydantic_core import to_json

from sparse_bitnet.core import DataError
from sparse_bitnet.study.cells import Cell
from sparse_bitnet.train.recipe import checked

ROWS_FILE = "rows.jsonl"
LONGEST_INTEGER = 18  # digits


@dataclass(frozen=True)
class Row:
    """A finished cell."""

    key: str  # see SweepRecipe.key
    cell: Cell
    perplexity: float  # on the validation split; NaN if training diverged
    accuracy: float | None  # of the cloze, a fraction; None if it was not measured
    raw: dict[str, Any]  # everything the line holds

    @property
    def learning_rate(self) -> float | None:
        """The highest of its schedule; None if the row does not record it."""
        config = self.raw.get("config")
        optimizer = config.get("optimizer") if isinstance(config, dict) else None
        rate = optimizer.get("learning_rate") if isinstance(optimizer, dict) else None
        return float(rate) if isinstance(rate, int | float) else self.cell.learning_rate

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.perplexity)

    def series(self, name: str) -> tuple[list[float], list[Any]]:
        """(tokens, values) of a history, without the points where nothing was measured."""
        history = self.raw.get("history")
        history = history if isinstance(history, dict) else {}
        tokens, values = history.get("tokens"), history.get(name)
        if not (isinstance(tokens, list) and isinstance(values, list)):
            return [], []
        both = zip(tokens, values, strict=False)
        pairs = [(t, v) for t, v in both if is_number(t) and is_number(v)]
        return [t for t, _ in pairs], [v for _, v in pairs]

    @property
    def snapshots(self) -> list[dict[str, Any]]:
        """The polarization snapshots that can be drawn: bins of one width, finite numbers."""
        found = self.raw.get("polarization")
        return [one for one in (found if isinstance(found, list) else []) if _is_snapshot(one)]

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
            row = _parse(json.loads(line, parse_int=_whole))
        except Exception as error:  # whatever a foreign line brings
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            problems.append(f"{path.name}, line {number}: skipped, {why[:300]}")
            continue
        rows[row.key] = row
    return list(rows.values()), problems


def append_row(path: str | Path, row: dict[str, Any]) -> None:
    """Append one line and sync it. Not finite becomes null, which every JSON reader knows.

    A line that an earlier crash left half written is closed first, so it spoils only itself.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = to_json(row, inf_nan_mode="null") + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(raw: Any) -> Row:
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    values = raw["cell"]
    known = Cell().to_dict()
    cell = checked(Cell, {k: v for k, v in values.items() if k in known}, "cell")
    perplexity = (raw.get("validation") or {}).get("perplexity")
    accuracy = (raw.get("cloze") or {}).get("accuracy")
    return Row(
        key=str(raw["key"]),
        cell=cell,
        perplexity=math.nan if perplexity is None else float(perplexity),
        accuracy=None if accuracy is None else float(accuracy),
        raw=raw,
    )


def _is_snapshot(one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("position"), str):
        return False
    lists = [one.get(name) or [] for name in ("magnitudes", "edges", "thresholds")]
    if not all(isinstance(values, list) and all(map(is_number, values)) for values in lists):
        return False
    bins, edges, thresholds = map(len, lists)
    return is_number(one.get("fraction")) and edges == bins + 1 > 1 and thresholds in (0, bins)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a row is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def _whole(digits: str) -> int | float:
    """An integer of JSON; as a float where it is too large for one, which infinity may be."""
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)
