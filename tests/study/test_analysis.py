"""Statistics against figures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_bitnet.study.analysis import Estimate, Runs, crossings, first_beyond, sizes
from sparse_bitnet.study.cells import Cell
from sparse_bitnet.study.rows import Row, append_row, read_rows

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def runs(tmp_path: Path, make_row: Make) -> Runs:
    """BF16 20 → 22 and 21 → 24.15 at 4:8 (ratios 1.1 and 1.15); BitNet 30 → 31.5 (1.05)."""
    for perplexity, accuracy, cell in (
        (20.0, 0.60, {"kind": "bf16", "pattern": "dense", "seed": 0}),
        (21.0, 0.50, {"kind": "bf16", "pattern": "dense", "seed": 1}),
        (22.0, 0.55, {"kind": "bf16", "pattern": "4:8", "seed": 0}),
        (24.15, 0.48, {"kind": "bf16", "pattern": "4:8", "seed": 1}),
        (99.0, 0.1, {"kind": "bf16", "pattern": "4:8", "seed": 2}),  # has no dense twin
        (30.0, None, {"kind": "bitnet", "pattern": "dense", "seed": 0}),
        (31.5, None, {"kind": "bitnet", "pattern": "4:8", "seed": 0}),
        (33.0, None, {"kind": "bitnet", "pattern": "4:8", "seed": 0, "method": "masked-gradient"}),
        (math.nan, None, {"kind": "bitnet", "pattern": "4:8", "seed": 1}),
        (40.0, None, {"kind": "bitnet", "pattern": "dense", "tokens_per_weight": 4}),
        (41.0, None, {"kind": "bitnet", "pattern": "4:8", "tokens_per_weight": 4}),
    ):
        append_row(tmp_path / "rows.jsonl", make_row(perplexity, accuracy, **cell))
    return Runs(read_rows(tmp_path)[0], "study-5m")


def test_estimate() -> None:
    one = Estimate((1.0, 2.0, 6.0))
    assert one.mean == 3
    assert one.spread == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert one.standard_error == pytest.approx(one.spread / math.sqrt(3))
    assert one.text(1) == "3.0 ± 2.6 (3 seeds)"
    assert Estimate((1.5,)).text(2, sign=True) == "+1.50 (1 seed)"
    assert Estimate((1.5,)).spread == 0
    assert Estimate((-1.5,)).text(2, sign=True) == "−1.50 (1 seed)"


def test_ratio_is_to_the_dense_twin_of_the_same_seed(runs: Runs) -> None:
    ratio = runs.ratio("bf16", "4:8")
    assert ratio is not None
    assert ratio.values == pytest.approx((1.1, 1.15))
    assert runs.ratio("bf16", "2:8") is None


def test_delta_and_accuracy(runs: Runs) -> None:
    delta = runs.delta("bf16", "4:8")
    assert delta is not None
    assert delta.values == pytest.approx((2.0, 3.15))
    points = runs.delta("bf16", "4:8", "accuracy")
    assert points is not None
    assert points.values == pytest.approx((-0.05, -0.02))
    assert runs.delta("bitnet", "4:8", "accuracy") is None


def test_advantage_pairs_kinds_by_seed(runs: Runs) -> None:
    by_ratio, by_difference = runs.advantage("4:8"), runs.advantage("4:8", "difference")
    assert by_ratio is not None
    assert by_difference is not None
    assert by_ratio.values == pytest.approx((1.1 - 1.05,))
    assert by_difference.values == pytest.approx((2.0 - 1.5,))


def test_excess_over_a_reference(runs: Runs) -> None:
    gap = runs.excess(
        {"kind": "bitnet", "pattern": "4:8"},
        kind="bitnet",
        pattern="4:8",
        method="masked-gradient",
    )
    assert gap is not None
    assert gap.values == pytest.approx((1.5,))


def test_main_grid_is_the_length_of_most_rows(runs: Runs) -> None:
    assert runs.main_length == 100
    assert runs.lengths("4:8") == [4, 100]
    assert runs.patterns() == ["4:8"]
    short = runs.ratio("bitnet", "4:8", tokens_per_weight=4.0)
    assert short is not None
    assert short.values == pytest.approx((1.025,))
    assert runs.label == "4.7M weights"


def test_crossings_are_linear_in_the_logarithm() -> None:
    # Gaps −1 at 4 and +1 at 64: zero half way in the logarithm, at 16.
    assert crossings([4, 64], [-1, 1]) == [pytest.approx(16)]
    assert crossings([4, 64], [1, -1]) == [pytest.approx(16)]
    # +1 at 4, −1 at 16, +3 at 256: at 8, and a quarter of the way from 16 to 256.
    assert crossings([4, 16, 256], [1, -1, 3]) == [pytest.approx(8), pytest.approx(32)]
    assert crossings([4, 16, 64], [1, 2, 0.5]) == []
    assert crossings([4, 16, 64], [0, 1, 2]) == [pytest.approx(4)]
    assert crossings([4], [-1]) == []


def test_steps_are_those_of_the_length(tmp_path: Path, make_row: Make) -> None:
    for seed, length, steps in ((0, 100, 1800), (1, 100, 1800), (0, 4, 72)):
        row = make_row(30, kind="bf16", pattern="4:8", seed=seed, tokens_per_weight=length)
        append_row(tmp_path / "rows.jsonl", row | {"steps": steps})
    found = Runs(read_rows(tmp_path)[0], "study-5m")
    assert (found.steps(100.0), found.steps(4.0), found.steps(16.0)) == ([1800], [72], [])


def test_first_beyond_goes_from_dense_to_sparse() -> None:
    ratios = {"2:8": 1.5, "6:8": 1.02, "4:8": 1.12, "3:8": 1.05}
    assert first_beyond(ratios, 1.1) == "4:8"
    assert first_beyond(ratios, 2.0) is None


def test_sizes_by_number_of_rows(make_row: Make) -> None:
    def row(size: str) -> Row:
        raw = make_row(30, size=size)
        from sparse_bitnet.study.cells import Cell

        return Row(raw["key"], Cell.from_dict(raw["cell"], "t"), 30, None, raw)

    assert sizes([row("study-20m"), row("study-5m"), row("study-5m")]) == ["study-5m", "study-20m"]


def test_weights_are_the_first_count_that_is_one() -> None:
    counts = (None, math.nan, -math.inf, 0, True, "many", 1_200_000, 5)
    rows = [
        Row(str(i), Cell(size="study-1m", seed=i), 30.0, None, {"weights": count})
        for i, count in enumerate(counts)
    ]
    assert Runs(rows, "study-1m").weights == 1_200_000
    assert Runs(rows[:6], "study-1m").label == "study-1m"
