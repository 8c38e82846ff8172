"""What the report says about learning rates: every rate that was tried, and which one was used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_bitnet.study.analysis import Runs
from sparse_bitnet.study.page import Section
from sparse_bitnet.study.rows import Row, append_row, read_rows
from sparse_bitnet.study.sections_variants import learning_rate

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def rows(tmp_path: Path, make_row: Make) -> Callable[..., list[Row]]:
    """Rows as read from a file: ``[(perplexity, rate in the configuration, cell)]``."""

    def read(*given: tuple[float, float | None, dict[str, Any]]) -> list[Row]:
        path = tmp_path / "rows.jsonl"
        path.unlink(missing_ok=True)
        for number, (perplexity, rate, cell) in enumerate(given):
            row = make_row(perplexity, **cell) | {"key": str(number)}
            row["config"] = None if rate is None else {"optimizer": {"learning_rate": rate}}
            append_row(path, row)
        found, problems = read_rows(path)
        assert not problems
        return found

    return read


def grid() -> list[tuple[float, float | None, dict[str, Any]]]:
    """The main grid at 3e-3, both kinds, and dense models at two other rates."""
    given: list[tuple[float, float | None, dict[str, Any]]] = []
    for kind, dense in (("bf16", 27.0), ("bitnet", 34.0)):
        given += [(dense, 3e-3, {"kind": kind, "pattern": "dense"})]
        given += [(dense + 1, 3e-3, {"kind": kind, "pattern": "6:8"})]
        for rate, more in ((1.5e-3, 0.5), (6e-3, -0.25 if kind == "bitnet" else 2.0)):
            cell = {"kind": kind, "pattern": "dense", "learning_rate": rate}
            given.append((dense + more, rate, cell))
    return given


def table(section: Section) -> dict[str, tuple[str, ...]]:
    (only,) = section.tables
    assert only.header == ("learning rate", "BF16", "BitNet")
    return {row[0]: tuple(row[1:]) for row in only.rows}


def test_every_rate_is_shown_and_the_one_used_is_marked(rows: Any) -> None:
    section = learning_rate(Runs(rows(*grid()), "study-5m"))
    assert table(section) == {
        "0.0015": ("27.50", "34.50"),
        "0.003": ("27.00 (used)", "34.00 (used)"),
        "0.006": ("29.00", "33.75"),
    }
    assert not section.notes


def test_a_rate_that_only_one_kind_has(rows: Any) -> None:
    only = (40.0, 1e-2, {"kind": "bitnet", "pattern": "dense", "learning_rate": 1e-2})
    found = table(learning_rate(Runs(rows(*grid(), only), "study-5m")))
    assert found["0.01"] == ("–", "40.00")


def test_what_is_not_the_published_dense_model_does_not_count(rows: Any) -> None:
    """Ablations, schedules, other lengths and sizes, diverged runs; and a second seed."""
    dense = {"kind": "bitnet", "pattern": "dense", "learning_rate": 1e-2}
    others = [
        (1.0, 1e-2, {**dense, "method": "4-bit-activations"}),
        (2.0, 1e-2, {**dense, "until": {0.5: "6:8"}}),
        (3.0, 1e-2, {**dense, "tokens_per_weight": 16}),
        (4.0, 1e-2, {**dense, "size": "study-1m"}),
        (float("nan"), 1e-2, dense),
        (5.0, 3e-3, {"kind": "bitnet", "pattern": "dense", "seed": 1}),
    ]
    found = table(learning_rate(Runs(rows(*grid(), *others), "study-5m")))
    assert set(found) == {"0.0015", "0.003", "0.006"}
    assert found["0.003"][1] == "34.00 (used)", "the lowest seed's"


def test_the_order_of_rows_does_not_matter(rows: Any) -> None:
    given = [*grid(), (99.0, 3e-3, {"kind": "bitnet", "pattern": "dense", "seed": 1})]
    forward = table(learning_rate(Runs(rows(*given), "study-5m")))
    assert table(learning_rate(Runs(rows(*given[::-1]), "study-5m"))) == forward


def test_one_rate_is_no_comparison(rows: Any) -> None:
    given = [one for one in grid() if "learning_rate" not in one[2]]
    section = learning_rate(Runs(rows(*given), "study-5m"))
    assert section.notes == ["Needs dense models of both kinds with other learning rates."]
    assert not section.tables


def test_rows_that_do_not_say_their_rate(rows: Any) -> None:
    """Then the cell's own counts; a row without either is left out."""
    given = [(perplexity, None, cell) for perplexity, _, cell in grid()]
    found = table(learning_rate(Runs(rows(*given), "study-5m")))
    assert found == {"0.0015": ("27.50", "34.50"), "0.006": ("29.00", "33.75")}


def test_other_figures_are_of_the_rate_in_use(rows: Any) -> None:
    """A dense model at another rate must not become the reference of the sparse ones."""
    runs = Runs(rows(*grid()), "study-5m")
    for kind, dense in (("bf16", 27.0), ("bitnet", 34.0)):
        ratio = runs.ratio(kind, "6:8")
        assert ratio is not None
        assert ratio.values == (pytest.approx((dense + 1) / dense),)
