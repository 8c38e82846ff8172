"""Rows of two settings never meet: what makes a setting, and which rows belong to which."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_bitnet.study.analysis import Runs
from sparse_bitnet.study.cells import read_sweep
from sparse_bitnet.study.experiments import experiments, settings
from sparse_bitnet.study.rows import Row, append_row, read_rows
from sparse_bitnet.train.recipe import to_dict

Make = Callable[..., dict[str, Any]]
Sweep = Callable[..., list[dict[str, Any]]]
RECIPE = """
base:
  data: {{path: tokens, sequence_length: 64, batch_size: {batch}}}
  optimizer: {{learning_rate: {rate}}}
  schedule: {{warmup: {warmup}}}
kinds: {kinds}
defaults: {{size: tiny, tokens_per_weight: 2}}
blocks:
  - {{pattern: [dense, 4:8], kind: [bf16, bitnet], seed: [0, 1], tokens_per_weight: {lengths}}}
  - {{pattern: dense, kind: [bf16, bitnet], learning_rate: {rates}}}
"""


@pytest.fixture
def sweep(tmp_path: Path, make_row: Make) -> Sweep:
    """Rows that a recipe would leave, each with perplexity ``ppl`` (4:8: a tenth more)."""

    def run(ppl: float, **changes: Any) -> list[dict[str, Any]]:
        values = {
            **{"batch": 8, "rate": 3e-3, "warmup": 0.02, "kinds": {}, "lengths": [2], "rates": []},
            **changes,
        }
        text = RECIPE.format(**values)
        if not values["rates"]:
            text = text[: text.rindex("  - {pattern: dense")]
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        recipe = read_sweep(path)
        rows = []
        for cell in recipe.cells:
            fields = cell.to_dict()
            row = make_row(ppl * (1.1 if cell.pattern == "4:8" else 1.0), **fields)
            row["key"] = recipe.key(cell, "")
            row["config"] = json.loads(json.dumps(to_dict(recipe.config(cell))))
            row["config"]["run"]["directory"] = f"runs/{row['key']}"
            row["evaluation"] = {"window": 0, "cloze_text": "jsonl:here"}
            row["data"] = {"train": [1000], "tokenizer": "abc"}
            rows.append(row)
        return rows

    return run


def read(tmp_path: Path, *groups: list[dict[str, Any]]) -> list[Row]:
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    for row in (row for group in groups for row in group):
        append_row(path, row)
    rows, problems = read_rows(path)
    assert not problems
    return rows


def perplexities(runs: Runs) -> set[float]:
    return {round(row.perplexity, 9) for row in runs.rows}


def test_one_recipe_is_one_setting(tmp_path: Path, sweep: Sweep) -> None:
    rows = read(tmp_path, sweep(30.0, lengths=[2, 4], rates=[1e-3, 6e-3]))
    (only,) = experiments(rows)
    assert {row.key for row in only.rows} == {row.key for row in rows}
    assert (only.name, only.differs, only.label) == ("tiny", [], "4.7M weights")
    assert only.rates("bf16") == {0.001: 30.0, 0.003: 30.0, 0.006: 30.0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"batch": 4}, "batch size 4 (8)"),
        ({"warmup": 0.1}, "warmup 0.1 (0.02)"),
        ({"rate": 2e-3}, "learning rate 0.002 (0.003)"),
    ],
)
def test_another_batch_warm_up_or_rate_is_another_setting(
    tmp_path: Path, sweep: Sweep, change: dict[str, Any], told: str
) -> None:
    many = sweep(30.0, lengths=[2, 4])
    few = sweep(50.0, **change)
    # The cells read the same; only the configuration tells them apart.
    assert {str(r["cell"]) for r in few} < {str(r["cell"]) for r in many}
    for rows in (read(tmp_path, many, few), read(tmp_path, few, many)):
        main, second = experiments(rows)
        assert perplexities(main) == {30.0, 33.0}
        assert perplexities(second) == {50.0, 55.0}
        assert (main.differs, second.differs) == ([], [told])
        assert second.name == "tiny-2"
        assert second.label == f"4.7M weights, {told.partition(' (')[0]}"
        dense = second.perplexity(kind="bf16", pattern="dense")
        assert dense is not None
        assert dense.values == (50.0, 50.0)


def test_every_difference_is_told_once(tmp_path: Path, sweep: Sweep) -> None:
    rows = read(tmp_path, sweep(30.0, lengths=[2, 4]), sweep(50.0, batch=4, rate=2e-3, warmup=0.1))
    _, second = experiments(rows)
    assert sorted(second.differs) == [
        "batch size 4 (8)",
        "learning rate 0.002 (0.003)",
        "warmup 0.1 (0.02)",
    ]


def test_a_kind_may_have_an_optimizer_of_its_own(tmp_path: Path, sweep: Sweep) -> None:
    own = {"bf16": {"optimizer": {"learning_rate": 2e-3}, "schedule": {"warmup": 0.1}}}
    rows = read(tmp_path, sweep(30.0, kinds=json.dumps(own)))
    (only,) = experiments(rows)
    assert only.main_rate == {"bf16": 0.002, "bitnet": 0.003}
    assert only.ratio("bf16", "4:8") is not None
    assert only.ratio("bitnet", "4:8") is not None
    # Beside a sweep in which both kinds have the one's settings, each keeps its partner.
    shared = sweep(40.0, lengths=[2, 4], warmup=0.05)
    main, second = experiments(read(tmp_path, sweep(30.0, kinds=json.dumps(own)), shared))
    assert perplexities(main) == {40.0, 44.0}
    assert {(r.cell.kind, r.perplexity) for r in second.rows if r.cell.pattern == "dense"} == {
        ("bf16", 30.0),
        ("bitnet", 30.0),
    }


def test_a_learning_rate_of_the_cells_own_joins_the_setting(tmp_path: Path, sweep: Sweep) -> None:
    main_rows = sweep(30.0, lengths=[2, 4], rates=[6e-3])
    rows = read(tmp_path, main_rows, sweep(50.0, batch=4, rates=[1e-3]))
    main, second = experiments(rows)
    rates = [{r.learning_rate for r in one.rows} for one in (main, second)]
    assert rates == [{0.003, 0.006}, {0.003, 0.001}]


def test_where_the_data_lay_and_how_it_ran_are_no_settings(tmp_path: Path, sweep: Sweep) -> None:
    rows = sweep(30.0)
    moved = copy.deepcopy(rows)
    for row in moved:
        row["key"] += "x"
        row["cell"]["seed"] += 2
        row["config"]["run"] |= {"seed": row["cell"]["seed"], "cuda_graph": True, "log_every": 3}
        row["config"]["data"] |= {"path": "/elsewhere", "micro_batch_size": 1}
        row["evaluation"]["cloze_text"] = "jsonl:there"
        # A setting that came with a later version: here its default, which the others ran with.
        del row["config"]["sparsity"]["method"]
        del row["config"]["optimizer"]["clip"]
    (only,) = experiments(read(tmp_path, rows, moved))
    assert len(only.rows) == 16
    for row in moved:
        row["data"]["train"] = [2000]
    main, second = experiments(read(tmp_path, rows, moved))
    assert second.differs == ["train [2000] ([1000])"]
    assert len(main.rows) == len(second.rows) == 8


def test_a_configuration_that_is_refused_today_counts_as_it_stands(
    tmp_path: Path, sweep: Sweep
) -> None:
    rows, odd = sweep(30.0, lengths=[2, 4]), sweep(50.0)
    for row in odd:
        row["config"]["optimizer"]["momentum"] = 0.5
        row["key"] += "x"
    main, second = experiments(read(tmp_path, rows, odd))
    assert "momentum 0.5 (not said)" in second.differs
    assert perplexities(main) == {30.0, 33.0}


@pytest.mark.parametrize(
    "damage",
    [
        {"config": None},
        {"config": []},
        {"config": {"data": 3, "optimizer": {"learning_rate": "fast"}}},
        {"evaluation": [1], "data": "x"},
    ],
)
def test_hostile_settings(tmp_path: Path, sweep: Sweep, damage: dict[str, Any]) -> None:
    odd = [row | damage | {"key": row["key"] + "x"} for row in sweep(50.0)]
    found = experiments(read(tmp_path, sweep(30.0, lengths=[2, 4]), odd))
    assert len(found) == 2
    assert sum(len(one.rows) for one in found) == 24


def test_rows_that_diverged_belong_to_none(tmp_path: Path, sweep: Sweep) -> None:
    rows = sweep(30.0)
    rows[0]["validation"]["perplexity"] = None
    found = read(tmp_path, rows)
    (only,) = experiments(found)
    assert len(only.rows) == len(found) - 1
    assert "run.seed" not in settings(found[0])
