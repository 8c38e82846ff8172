"""Recipes and the command line: strict, and helpful when wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparse_bitnet.core import ConfigError, PatternError
from sparse_bitnet.train.config import TrainConfig
from sparse_bitnet.train.recipe import (
    config_from_dict,
    differences,
    digest,
    load_recipe,
    options_help,
    read_yaml,
    to_yaml,
)

MINIMAL = "data: {path: somewhere}\n"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def error_of(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    config = load_recipe(path)
    assert config.run.directory == f"runs/{path.stem}"
    explained = sum(line.lstrip().startswith("#") for line in path.read_text().splitlines())
    assert explained >= 3, "recipes explain themselves"


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 7


def test_file_then_command_line(file: Path) -> None:
    file.write_text(
        "data: {path: somewhere, batch_size: 4}\n"
        "sparsity: {pattern: 6:8, until: {0.5: dense}, method: {gradient: masked}}\n"
        "optimizer: {learning_rate: 1e-3, betas: [0.8, 0.9]}\n"
    )
    arguments = (
        "--optimizer.learning-rate 3e-4 --data.batch_size=16 --run.no-export --run.tensorboard "
        "--run.seed 7 --optimizer.betas 0.7 0.95 --sparsity.method.activation-bits 4 "
        "--data.micro-batch-size 8"
    )
    config = load_recipe(file, arguments.split())
    assert config.sparsity.pattern == "6:8"
    assert config.sparsity.until == {0.5: "dense"}
    assert config.sparsity.method.gradient == "masked"
    assert config.sparsity.method.activation_bits == 4
    assert config.optimizer.learning_rate == 3e-4
    assert config.optimizer.betas == (0.7, 0.95)
    assert (config.data.batch_size, config.data.micro_batch_size) == (16, 8)
    assert (config.run.export, config.run.tensorboard, config.run.seed) == (False, True, 7)
    again = load_recipe(
        file, ["--sparsity.until", "{0.25: dense, 0.5: 7:8}", "--run.tensorboard", "false"]
    )
    assert again.sparsity.until == {0.25: "dense", 0.5: "7:8"}
    assert not again.run.tensorboard


def test_yaml_1_2_numbers(file: Path) -> None:
    file.write_text("a: 6:8\nb: 1e-3\nc: 12\nd: yes\ne: true\nf: ~\ng: 1.5\n")
    expected = {"a": "6:8", "b": 1e-3, "c": 12, "d": "yes", "e": True, "f": None, "g": 1.5}
    assert read_yaml(file) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--optimizer.lerning-rate", "1"], "the nearest key is optimizer.learning_rate"),
        (["--optimiser.clip", "1"], "optimiser is unknown; the nearest key is optimizer"),
        (["--learning-rate", "1"], "the nearest key is optimizer.learning_rate"),
        (["--run.seed.x", "1"], "command line: run.seed.x is unknown"),
        (["--sparsity.method.gradeint", "masked"], "nearest key is sparsity.method.gradient"),
        (["--optimizer.learning-rate", "fast"], "learning_rate is 'fast': it must be a number"),
        (["--optimizer.learning-rate", "nan"], "learning_rate is 'nan': it must be a number"),
        (["--schedule.steps", "1.5"], "schedule.steps is 1.5: it must be a whole number"),
        (["--run.export", "7"], "'7' stands where an option"),
        (["--run.export=7"], "run.export is 7: it must be true or false"),
        (["--optimizer.betas", "0.9"], "betas is 0.9: it must be tuple[float, float]"),
        (["--data.path"], "--data.path needs a value"),
        (["stray"], "'stray' stands where an option"),
        (["--sparsity.until", "{0.5: ["], "is not YAML"),
        (["--model", "3"], "expected a mapping of keys to values, found 3"),
    ],
)
def test_wrong_arguments_are_named(file: Path, override: list[str], message: str) -> None:
    assert message in error_of(file, *override)


def test_wrong_keys_of_a_file_are_named(file: Path) -> None:
    file.write_text("data: {path: x}\nschedule: {step: 5}\n")
    assert error_of(file) == f"{file}: schedule.step is unknown; the nearest key is schedule.steps"
    file.write_text("data: {path: x}\nsteps: 5\n")
    assert error_of(file) == f"{file}: steps is unknown; the nearest key is schedule.steps"
    file.write_text("- a\n")
    assert "expected a mapping" in error_of(file)
    file.write_text("a: [")
    assert f"{file} is not YAML" in error_of(file)
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read" in error_of(file)
    file.unlink()
    assert "cannot be read" in error_of(file)


def test_hostile_yaml_builds_no_objects(file: Path) -> None:
    file.write_text("data: !!python/object/apply:os.system ['true']\n")
    assert "is not YAML" in error_of(file)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"path": ""}, "data.path is '': it must be either"),
        ("data", {"mixture": {"a": 1.0}}, "it must be either a prepared directory here or"),
        ("data", {"sequence_length": 0}, "data.sequence_length is 0: it must be a whole number"),
        ("data", {"batch_size": 6, "micro_batch_size": 4}, "a divisor of data.batch_size = 6"),
        ("model", {"source": ""}, "model.source is ''"),
        ("model", {"vocab_size": -1}, "model.vocab_size is -1"),
        ("model", {"attention": "flash"}, "it must be one of: sdpa, eager"),
        ("sparsity", {"kind": "int4"}, "sparsity.kind is 'int4': it must be one of: bitnet, bf16"),
        ("sparsity", {"until": {1.5: "dense"}}, "sparsity.until is 1.5: it must be a fraction"),
        ("sparsity", {"method": {"gradient": "none"}}, "method.gradient is 'none'"),
        ("optimizer", {"learning_rate": 0}, "it must be above 0 and at most 10"),
        ("optimizer", {"betas": [0.9, 1.0]}, "two numbers in [0, 1)"),
        ("optimizer", {"epsilon": 0}, "optimizer.epsilon is 0.0"),
        ("optimizer", {"weight_decay": -1}, "optimizer.weight_decay is -1.0: it must be at least"),
        ("optimizer", {"clip": -1}, "optimizer.clip is -1.0: it must be at least 0"),
        ("schedule", {"steps": 0}, "schedule.steps is 0"),
        ("schedule", {"warmup": 2}, "schedule.warmup is 2.0: it must be at least 0 and at most 1"),
        ("schedule", {"final": -0.1}, "schedule.final is -0.1"),
        ("schedule", {"weight_decay": "linear"}, "one of: auto, cosine, constant"),
        ("schedule", {"weight_decay_until": 0}, "schedule.weight_decay_until is 0.0"),
        ("run", {"directory": ""}, "run.directory is ''"),
        ("run", {"seed": -1}, "run.seed is -1"),
        ("run", {"device": "tpu"}, "run.device is 'tpu': it must be one of: auto, cpu, cuda"),
        ("run", {"precision": "fp8"}, "one of: auto, fp32, bf16"),
        ("run", {"log_every": 0}, "run.log_every is 0"),
        ("run", {"keep": 0}, "run.keep is 0"),
        ("run", {"checkpoint_every": -1}, "run.checkpoint_every is -1: it must be at least 0"),
    ],
)
def test_ranges(section: str, values: dict[str, Any], message: str) -> None:
    recipe: dict[str, Any] = {"data": {"path": "x"}}
    recipe.setdefault(section, {}).update(values)
    with pytest.raises(ConfigError) as caught:
        config_from_dict(recipe, "here")
    assert str(caught.value).startswith("here: ")
    assert message in str(caught.value)


def test_patterns_are_checked_at_once() -> None:
    for sparsity in ({"pattern": "6of8"}, {"until": {0.5: "9:8"}}, {"rules": {"x": "none"}}):
        with pytest.raises(PatternError):
            config_from_dict({"data": {"path": "x"}, "sparsity": sparsity}, "here")


def test_round_trip(file: Path) -> None:
    config = load_recipe(file, ["--sparsity.until", "{0.5: dense}", "--sparsity.pattern", "2:4"])
    file.write_text(to_yaml(config))
    assert load_recipe(file) == config


def test_identity_ignores_what_does_not_change_the_weights(file: Path) -> None:
    one = load_recipe(file)
    same = load_recipe(file, ["--run.directory", "elsewhere", "--run.log-every", "3"])
    other = load_recipe(file, ["--optimizer.learning-rate", "0.5", "--run.seed", "1"])
    assert digest(one) == digest(same)
    assert digest(one) != digest(other)
    assert differences(one, other) == [
        "optimizer.learning_rate is 0.001 there and 0.5 here",
        "run.seed is 0 there and 1 here",
    ]


def test_help_names_every_option() -> None:
    text = options_help("sparse-bitnet train")
    for option in ("--optimizer.learning-rate", "--sparsity.until", "--run.directory"):
        assert option in text
    assert "Peak learning rate" in text


def test_sections_have_defaults(file: Path) -> None:
    assert load_recipe(file).sparsity.pattern == "6:8"
    assert isinstance(load_recipe(file), TrainConfig)


@pytest.mark.parametrize(
    "text",
    [
        "data: &a [*a]",
        "data: ["
        + ", ".join(["&a0 [x, x]", *(f"&a{n + 1} [*a{n}, *a{n}]" for n in range(40))])
        + "]",
        "data: {path: " + "1" * 5000 + "}",
        "data: " + "[" * 5000,
        "data: {path: !!timestamp yesterday}",
        "data: {path: !!python/object/apply:os.getcwd []}",
        "x" * (2**20 + 1),
    ],
)
def test_hostile_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("steps", ["9" * 400, "-" + "9" * 400])
def test_numbers_that_no_counter_holds(tmp_path: Path, steps: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {{path: x}}\nschedule: {{steps: {steps}}}\noptimizer: {{clip: 1}}")
    with pytest.raises(ConfigError, match=r"schedule\.steps is"):
        load_recipe(path)
