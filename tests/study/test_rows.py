"""Rows: what is written comes back; what is broken costs only itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_bitnet.core import DataError
from sparse_bitnet.study.rows import append_row, read_rows

Make = Callable[..., dict[str, Any]]


def test_rows_come_back(tmp_path: Path, make_row: Make) -> None:
    append_row(tmp_path / "rows.jsonl", make_row(30.5, kind="bf16", pattern="6:8", seed=2))
    rows, problems = read_rows(tmp_path)
    assert problems == []
    assert rows[0].perplexity == 30.5
    assert (rows[0].cell.kind, rows[0].cell.pattern, rows[0].cell.seed) == ("bf16", "6:8", 2)
    assert rows[0].accuracy == 0.5
    assert rows[0].zeros == pytest.approx(0.41)
    tokens, loss = rows[0].series("loss")
    assert (len(tokens), loss[0]) == (12, 9.0)


def test_a_truncated_last_line_is_skipped_and_does_not_spoil_the_next(
    tmp_path: Path, make_row: Make
) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, make_row(30, pattern="6:8"))
    append_row(path, make_row(31, pattern="4:8"))
    path.write_bytes(path.read_bytes()[:-500])
    rows, problems = read_rows(path)
    assert [row.cell.pattern for row in rows] == ["6:8"]
    assert len(problems) == 1
    assert "line 2: skipped" in problems[0]
    append_row(path, make_row(32, pattern="2:8"))
    rows, _ = read_rows(path)
    assert [row.cell.pattern for row in rows] == ["6:8", "2:8"]


def test_not_finite_figures_mean_diverged_and_stay_valid_json(
    tmp_path: Path, make_row: Make
) -> None:
    path = tmp_path / "rows.jsonl"
    row = make_row(math.nan, pattern="6:8")
    row["history"]["loss"][3] = math.inf
    append_row(path, row)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    (found,), _ = read_rows(path)
    assert found.diverged
    assert len(found.series("loss")[0]) == 11
    # Python's own dialect, as another program may have written it.
    path.write_text(json.dumps(make_row(math.nan, pattern="6:8")) + "\n")
    assert read_rows(path)[0][0].diverged


def test_unknown_fields_are_kept_and_do_no_harm(tmp_path: Path, make_row: Make) -> None:
    path = tmp_path / "rows.jsonl"
    row = make_row(30, pattern="6:8")
    row["cell"]["colour"] = "blue"
    row["novelty"] = [1]
    path.write_text(json.dumps(row) + "\n")
    rows, problems = read_rows(path)
    assert problems == []
    assert rows[0].raw["novelty"] == [1]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        '{"key": "a"}',
        '{"key": "a", "cell": {"kind": "fp8"}}',
        '{"key": "a", "cell": 5}',
        '{"key": "a", "cell": {}, "validation": {"perplexity": "many"}}',
        '{"key": "a", "cell": {}, "environment": 5}',
        '{"key": "a", "cell": {}, "history": {"loss": 3}}',
        '{"key": "a", "cell": {}, "polarization": [3]}',
        '{"key": "a", "cell": {}, "tokens": ' + "9" * 400 + "}",
        "{" * 5000,
        "\x00\x01",
    ],
)
def test_hostile_lines_are_reported_and_skipped(tmp_path: Path, make_row: Make, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n" + json.dumps(make_row(30, pattern="6:8")) + "\n")
    rows, problems = read_rows(path)
    assert [row.perplexity for row in rows] == [30]
    assert len(problems) == 1


def test_the_last_of_two_rows_of_one_key_counts(tmp_path: Path, make_row: Make) -> None:
    for perplexity in (30, 29):
        append_row(tmp_path / "rows.jsonl", make_row(perplexity, pattern="6:8"))
    (row,), _ = read_rows(tmp_path)
    assert row.perplexity == 29


def test_no_rows_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no such file; a sweep writes it"):
        read_rows(tmp_path)
