"""Recipes: expansion, order, identity, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sparse_bitnet.core import ConfigError
from sparse_bitnet.study.cells import Cell, SweepRecipe, key_today, read_sweep, run_key
from sparse_bitnet.train.recipe import checked, to_dict

RECIPES = Path(__file__).parents[2] / "recipes" / "sweeps"
BASE = """
base: {data: {path: somewhere, sequence_length: 64, batch_size: 16}}
defaults: {size: tiny, tokens_per_weight: 2}
"""


def key(recipe: SweepRecipe, number: int, **facts: Any) -> str:
    return run_key(recipe.config(recipe.cells[number]), recipe.evaluation, facts)


def write(tmp_path: Path, blocks: str, base: str = BASE) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(base + blocks)
    return path


def test_axes_multiply_in_written_order_and_repeated_cells_run_once(tmp_path: Path) -> None:
    recipe = read_sweep(
        write(
            tmp_path,
            """
blocks:
  - name: a
    pattern: [dense, 4:8]
    kind: [bf16, bitnet]
  - name: b
    pattern: 4:8
    cells: [{kind: bitnet}, {kind: bitnet, seed: 1, until: {0.5: dense}}]
""",
        )
    )
    told = [(c.kind, c.pattern, c.seed) for c in recipe.cells]
    assert told == [
        ("bf16", "dense", 0),
        ("bitnet", "dense", 0),
        ("bf16", "4:8", 0),
        ("bitnet", "4:8", 0),
        ("bitnet", "4:8", 1),
    ]
    assert recipe.cells[4].schedule == "dense to 50%"


def test_a_cell_written_in_two_ways_is_one_run(tmp_path: Path) -> None:
    """The recipe's rate for BF16, said once more in a cell; BitNet's is another."""
    blocks = """
kinds: {bf16: {optimizer: {learning_rate: 4.0e-3}}}
blocks:
  - {name: grid, pattern: dense, kind: [bf16, bitnet]}
  - {name: rates, pattern: dense, kind: [bf16, bitnet], learning_rate: [5.0e-4, 4e-3]}
"""
    recipe = read_sweep(write(tmp_path, blocks))
    assert [(c.kind, c.learning_rate) for c in recipe.cells] == [
        *(("bf16", None), ("bitnet", None)),
        *(("bf16", 0.0005), ("bitnet", 0.0005), ("bitnet", 0.004)),
    ]
    assert len({key(recipe, number) for number in range(5)}) == 5


def test_steps_follow_from_tokens_per_weight(tmp_path: Path) -> None:
    recipe = read_sweep(write(tmp_path, "blocks: [{pattern: 4:8}]"))
    # tiny: 2 blocks of 64·64·3 + 3·64·128 weights
    weights = 2 * (64 * 64 * 3 + 3 * 64 * 128)
    config = recipe.config(recipe.cells[0])
    assert config.schedule.steps == round(2 * weights / (16 * 64))
    assert config.sparsity.pattern == "4:8"
    assert config.model.source == "tiny"


def test_key_is_of_what_decides_the_figures(tmp_path: Path) -> None:
    first = read_sweep(write(tmp_path, "blocks: [{pattern: [4:8, 6:8], method: published}]"))
    a = key(first, 0, train=[1000])
    assert a != key(first, 1, train=[1000])
    assert a != key(first, 0, train=[2000])
    moved = read_sweep(
        write(
            tmp_path,
            "blocks: [{pattern: 4:8}]\nname: other",
            BASE.replace("somewhere", "elsewhere"),
        )
    )
    assert key(moved, 0, train=[1000]) == a  # a path is not what is in it
    faster = read_sweep(
        write(tmp_path, "blocks: [{pattern: 4:8}]", BASE + "evaluation: {window: 32}\n")
    )
    assert key(faster, 0, train=[1000]) != a


def test_a_cell_survives_json() -> None:
    cell = checked(Cell, {"kind": "bf16", "until": {0.66: "6:8", 0.33: "dense"}}, "here")
    assert cell.until == ((0.33, "dense"), (0.66, "6:8"))
    assert checked(Cell, cell.to_dict(), "there") == cell


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocks: [{kind: fp8}]", "kind is 'fp8': it must be 'bf16' or 'bitnet'"),
        ("blocks: [{size: huge}]", "size is 'huge'; choose among tiny"),
        ("blocks: [{methods: published}]", "methods is unknown; did you mean method?"),
        ("blocks: [{method: [nonsense]}]", "method is 'nonsense'; choose among published"),
        ("blocks: [{pattern: 9:8}]", "9:8 is out of range"),
        ("blocks: [{tokens_per_weight: 0}]", "tokens_per_weight is 0: it must be greater than 0"),
        ("blocks: [{until: {half: dense}}]", "until.0.0 is 'half': it must be a valid number"),
        ("blocks: [{cells: [{seed: [0, 1]}]}]", "seed is [0, 1]: it must be a valid integer"),
        ("blocks: [{cells: }]", "is None: it must be a valid list"),
        ("blocks: [{}]\nbase: {schedule: {steps: 5}}", "give tokens_per_weight in a block"),
        ("blocks: [{}]\nkinds: {bf16: {sparsity: {pattern: 2:4}}}", "give pattern in a block"),
        ("blocks: [{}]\nkinds: {fp8: {}}", "kinds.fp8"),
        ("blocks: []", "no cells"),
        ("block: []", "block is unknown; did you mean blocks?"),
        ("blocks: [7]", "blocks.0 is 7: it must be a valid dictionary"),
        ("blocks: [{pattern: []}]", "pattern is an empty list"),
        ("blocks: [{pattern: 4:8}]\nbase: {model: 5}", "base.model is 5: it must be a valid dict"),
        ("blocks: [{pattern: 4:8}]\nevaluation: {windows: 3}", "did you mean window?"),
        ("blocks: [{pattern: 4:8}]\nevaluation: {window: -1}", "window is -1: it must be"),
    ],
)
def test_refusals_name_place_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_sweep(write(tmp_path, text))
    assert message in str(error.value)
    assert "sweep.yaml" in str(error.value)
    assert "such as" not in str(error.value)  # the hint for a schedule of patterns


def test_wrong_training_settings_are_found_before_anything_runs(tmp_path: Path) -> None:
    base = BASE + "\nbase: {data: {path: x, batchsize: 3}}\n"
    with pytest.raises(ConfigError, match=r"batchsize is unknown; did you mean batch_size"):
        read_sweep(write(tmp_path, "blocks: [{pattern: 4:8}]", base))


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = read_sweep(RECIPES / f"{name}.yaml")
    assert recipe.name == name


def test_a_row_of_an_older_version_keeps_its_cell(tmp_path: Path) -> None:
    recipe = read_sweep(write(tmp_path, "blocks: [{pattern: 4:8}]"))
    facts: dict[str, Any] = {"train": [1000], "tokenizer": "abc"}
    config = json.loads(json.dumps(to_dict(recipe.config(recipe.cells[0]))))
    del config["sparsity"]["method"]["backward"]  # a setting that came later, with a default
    row = {
        "key": "0123456789ab",
        "config": config,
        "evaluation": dataclasses.asdict(recipe.evaluation),
        "data": facts,
    }
    assert key_today(row) == key(recipe, 0, **facts)
    config["optimizer"]["learning_rate"] = 0.5
    assert key_today(row) != key(recipe, 0, **facts)


@pytest.mark.parametrize(
    "damage", [{"config": None}, {"config": {"no": 1}}, {"evaluation": {"no": 1}}]
)
def test_a_row_that_says_too_little_keeps_its_key(tmp_path: Path, damage: dict[str, Any]) -> None:
    recipe = read_sweep(write(tmp_path, "blocks: [{pattern: 4:8}]"))
    whole = {"config": to_dict(recipe.config(recipe.cells[0])), "evaluation": {}, "data": {}}
    assert key_today({"key": "0123456789ab", **whole, **damage}) == "0123456789ab"
    del whole["data"]
    assert key_today({"key": "0123456789ab", **whole}) == "0123456789ab"
    assert key_today({"key": ["foreign"], **whole}) == "['foreign']"  # as its row has it
