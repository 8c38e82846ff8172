"""Figures by hand, and settings: rows of two settings never meet."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sparse_bitnet.study.cells import read_sweep, run_key
from sparse_bitnet.study.frame import frame, mean_text, setting_labels
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
  - {{pattern: [dense, 4:8], kind: [bf16, bitnet], seed: {seeds}}}
  - {{pattern: dense, kind: [bf16, bitnet], learning_rate: {rates}}}
"""


@pytest.fixture
def sweep(tmp_path: Path, make_row: Make) -> Sweep:
    """Rows that a recipe would leave, each with perplexity ``ppl`` (4:8: a tenth more)."""

    def run(ppl: float, **changes: Any) -> list[dict[str, Any]]:
        defaults = {"batch": 8, "rate": 3e-3, "warmup": 0.02, "kinds": {}, "seeds": [0, 1]}
        values = {**defaults, "rates": [], **changes}
        text = RECIPE.format(**values)
        if not values["rates"]:
            text = text[: text.rindex("  - {pattern: dense")]
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        recipe = read_sweep(path)
        rows = []
        for cell in recipe.cells:
            row = make_row(ppl * (1.1 if cell.pattern == "4:8" else 1.0), **cell.to_dict())
            row["key"] = run_key(recipe.config(cell), recipe.evaluation, {})
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


def test_ratios_and_differences_by_hand(tmp_path: Path, make_row: Make) -> None:
    """BF16 20 → 22 and 21 → 24.15 at 4:8 (ratios 1.1 and 1.15); BitNet 30 → 31.5 (1.05)."""
    made = [
        make_row(perplexity, **cell)
        for perplexity, cell in (
            (20.0, {"kind": "bf16", "pattern": "dense", "seed": 0}),
            (21.0, {"kind": "bf16", "pattern": "dense", "seed": 1}),
            (22.0, {"kind": "bf16", "pattern": "4:8", "seed": 0}),
            (24.15, {"kind": "bf16", "pattern": "4:8", "seed": 1}),
            (99.0, {"kind": "bf16", "pattern": "4:8", "seed": 2}),  # has no dense baseline
            (30.0, {"kind": "bitnet", "pattern": "dense"}),
            (31.5, {"kind": "bitnet", "pattern": "4:8"}),
            (33.0, {"kind": "bitnet", "pattern": "4:8", "method": "masked-gradient"}),
            (33.6, {"kind": "bitnet", "pattern": "4:8", "until": {0.5: "dense"}}),
            (math.nan, {"kind": "bitnet", "pattern": "4:8", "seed": 1}),
            (40.0, {"kind": "bitnet", "pattern": "dense", "tokens_per_weight": 4}),
            (41.0, {"kind": "bitnet", "pattern": "4:8", "tokens_per_weight": 4}),
        )
    ]
    runs = frame(read(tmp_path, made))
    assert len(runs) == len(made) - 1, "the one that diverged is left out"
    sparse = runs[runs.pattern == "4:8"]

    def ratios(**wanted: Any) -> list[float]:
        chosen = sparse
        for column, value in wanted.items():
            chosen = chosen[chosen[column.replace("_", " ")] == value]
        return list(chosen.ratio)

    assert ratios(kind="bf16") == pytest.approx([1.1, 1.15, math.nan], nan_ok=True)
    assert ratios(kind="bitnet", tokens_per_weight=4) == pytest.approx([1.025])
    assert ratios(method="masked-gradient") == pytest.approx([1.1])
    more = sparse.set_index(["method", "schedule"])["over published"]
    assert more["masked-gradient", "scratch"] == pytest.approx(1.5)
    assert more["published", "dense to 50%"] == pytest.approx(2.1)


def test_mean_text() -> None:
    assert mean_text(pd.Series([1.0, 2.0, 6.0]), 1) == "3.0 ± 2.6 (3 seeds)"
    assert mean_text(pd.Series([-1.5, math.nan]), 2, "+") == "−1.50 (1 seed)"
    assert mean_text(pd.Series([math.nan])) == "–"


def test_one_recipe_is_one_setting(tmp_path: Path, sweep: Sweep) -> None:
    runs = frame(read(tmp_path, sweep(30.0, rates=[1e-3])))
    assert set(runs.setting) == {"", "learning rate 0.001"}
    assert len(runs[runs.setting != ""]) == 2


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"batch": 4}, "batch size 4"),
        ({"warmup": 0.1}, "warmup 0.1"),
        ({"rate": 2e-3}, "learning rate 0.002"),
        ({"batch": 4, "rate": 2e-3}, "batch size 4, learning rate 0.002"),
    ],
)
def test_another_batch_warm_up_or_rate_is_another_setting(
    tmp_path: Path, sweep: Sweep, change: dict[str, Any], label: str
) -> None:
    many, few = sweep(30.0, seeds=[0, 1, 2]), sweep(50.0, **change)
    # The cells read the same; only the configuration tells them apart.
    assert {str(r["cell"]) for r in few} < {str(r["cell"]) for r in many}
    for rows in (read(tmp_path, many, few), read(tmp_path, few, many)):
        runs = frame(rows)
        dense = runs[runs.pattern == "dense"].groupby("setting").perplexity
        assert {name: set(values) for name, values in dense} == {"": {30.0}, label: {50.0}}
        assert set(runs[runs.pattern == "4:8"].ratio.round(9)) == {1.1}


def test_a_kind_may_have_an_optimizer_of_its_own(tmp_path: Path, sweep: Sweep) -> None:
    own = {"bf16": {"optimizer": {"learning_rate": 2e-3}, "schedule": {"warmup": 0.1}}}
    runs = frame(read(tmp_path, sweep(30.0, kinds=json.dumps(own))))
    assert set(runs.setting) == {""}
    assert runs[runs.pattern == "4:8"].ratio.notna().all()


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
    assert set(frame(read(tmp_path, rows, moved)).setting) == {""}
    for row in moved:
        row["data"]["train"] = [2000]
    labels = frame(read(tmp_path, rows, moved, sweep(30.0, seeds=[5]))).setting
    assert set(labels) == {"", "train [2000]"}


def test_a_run_in_two_rows_counts_once(tmp_path: Path, sweep: Sweep) -> None:
    """Rows that two versions of the package wrote, of two keys."""
    rows = sweep(30.0)
    again = [row | {"key": row["key"] + "x"} for row in sweep(31.0)]
    assert set(frame(read(tmp_path, rows, again)).key) == {row["key"] for row in again}


@pytest.mark.parametrize(
    ("damage", "label"),
    [
        ({"optimizer": {"momentum": 0.5}}, "momentum 0.5"),  # refused today: counts as it stands
        (None, "not recorded"),
        ({}, "not recorded"),
        ({"optimizer": {"learning_rate": "fast"}}, "learning rate fast"),
    ],
)
def test_hostile_configurations(tmp_path: Path, sweep: Sweep, damage: Any, label: str) -> None:
    odd = [row | {"config": damage, "key": row["key"] + "x"} for row in sweep(50.0)]
    rows = read(tmp_path, sweep(30.0, seeds=[0, 1, 2]), odd)
    labels = setting_labels(rows)
    assert all(label in labels[row["key"]] for row in odd)
    assert {labels[row.key] for row in rows if not row.key.endswith("x")} == {""}
    assert len(frame(rows)) == len(rows)
