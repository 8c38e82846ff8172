"""Recipes and the command line: strict, and helpful when wrong."""

import math
from pathlib import Path

import pytest

from histories import rows
from sparse_bitnet import cli
from sparse_bitnet.core import ConfigError
from sparse_bitnet.train.recipe import (
    config_from_dict,
    differences,
    digest,
    load_recipe,
    options_help,
    read_yaml,
    to_yaml,
)
from tiny_models import preset_model

MINIMAL = "data: {path: somewhere}\n"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def error_of(file):
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    config = load_recipe(path)
    assert config.run.directory == f"runs/{path.stem}"
    explained = sum(line.lstrip().startswith("#") for line in path.read_text().splitlines())
    assert explained >= 3, "recipes explain themselves"


def test_file_then_command_line(file):
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
        file, ["--sparsity.until", "{0.25: dense, 0.5: 7:8}", "--run.no-tensorboard"]
    )
    assert again.sparsity.until == {0.25: "dense", 0.5: "7:8"}
    assert not again.run.tensorboard
    assert load_recipe(file, ["--sparsity.until", "{}"]).sparsity.until == {}
    mixed = load_recipe(file, ["--data.path", "", "--data.mixture", "{a: 1, 2024: 0.5}"])
    assert mixed.data.mixture == {"a": 1.0, "2024": 0.5}


def test_yaml_1_2_numbers(file):
    file.write_text("a: 6:8\nb: 1e-3\nc: 12\nd: yes\ne: true\nf: ~\ng: 1.5\n")
    expected = {"a": "6:8", "b": 1e-3, "c": 12, "d": "yes", "e": True, "f": None, "g": 1.5}
    assert read_yaml(file) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--optimizer.lerning-rate", "1"], "--optimizer.learning-rate"),
        (["--run.seed.x", "1"], "Unrecognized options: --run.seed.x"),
        (["--optimizer.learning-rate", "fast"], "--optimizer.learning-rate"),
        (["--schedule.steps", "1.5"], "--schedule.steps"),
        (["--optimizer.betas", "0.9"], "--optimizer.betas"),
        (["--sparsity.kind", "int4"], "--sparsity.kind"),
        (["--data.path"], "--data.path"),
        (["stray"], "Unrecognized options: stray"),
        (["--sparsity.until", "{0.5: ["], "is not YAML"),
        (["--sparsity.until", "{half: dense}"], "is 'half': it must be a valid number"),
        (["--sparsity.until", "0.25:dense"], "must be a valid dictionary such as '{0.5: dense}'"),
        (["--sparsity.pattern", "6of8"], "6of8"),
    ],
)
def test_wrong_arguments_are_named(file, override, message, capsys):
    with pytest.raises(SystemExit) as caught:
        load_recipe(file, override)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_wrong_keys_of_a_file_are_named(file):
    file.write_text("data: {path: x}\nschedule: {step: 5}\n")
    assert error_of(file) == f"{file}: schedule.step is unknown; did you mean steps?"
    file.write_text("data: {path: x}\nsteps: 5\n")
    assert f"{file}: steps is unknown; choose among data, model" in error_of(file)
    file.write_text("run: {seed: 1}\n")
    assert error_of(file) == f"{file}: data is missing"
    file.write_text("data: {path: x}\nsparsity: {rules: 3}\n")  # which is no schedule
    assert error_of(file) == f"{file}: sparsity.rules is 3: it must be a valid dictionary"
    file.write_text("- a\n")
    assert "it must be a dictionary" in error_of(file)
    file.write_text("1: 2\ndata: {path: x}\n")
    assert f"{file}: 1 is 1: Keys should be strings" in error_of(file)
    file.write_text("a: [")
    assert f"{file} is not YAML" in error_of(file)
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read" in error_of(file)
    file.unlink()
    assert "cannot be read" in error_of(file)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"path": ""}, "path is '': give either a prepared directory or a mixture"),
        ("data", {"mixture": {"a": 1.0}}, "give either a prepared directory or a mixture"),
        ("data", {"sequence_length": 0}, "data.sequence_length is 0: it must be greater than 0"),
        ("model", {"source": ""}, "model.source is ''"),
        ("model", {"vocab_size": -1}, "model.vocab_size is -1"),
        ("model", {"attention": "flash"}, "it must be 'sdpa' or 'eager'"),
        ("sparsity", {"kind": "int4"}, "sparsity.kind is 'int4': it must be 'bitnet' or 'bf16'"),
        ("sparsity", {"until": {1.5: "dense"}}, "1.5 is no fraction of training"),
        ("sparsity", {"until": "0.25:dense"}, "a valid dictionary such as '{0.5: dense}'"),
        ("sparsity", {"pattern": "6of8"}, "'6of8' is not understood"),
        ("sparsity", {"until": {0.5: "9:8"}}, "9:8 is out of range"),
        ("sparsity", {"rules": {"x": "none"}}, "'none' is not understood"),
        ("sparsity", {"quantization": {"begin": {"(": 0.4}}}, "( is no regular expression"),
        ("sparsity", {"quantization": {"until": 0.7, "begin": {"a": 0.4}}}, "at most 1 − until"),
        ("sparsity", {"kind": "bf16", "quantization": {"until": 0.7}}, "bf16 has no quantization"),
        ("sparsity", {"method": {"gradient": "none"}}, "it must be 'dense' or 'masked'"),
        ("teacher", {"temperature": 0}, "teacher.temperature is 0: it must be greater than 0"),
        ("teacher", {"weight": -1}, "teacher.weight is -1: it must be greater"),
        ("optimizer", {"learning_rate": 0}, "it must be greater than 0"),
        ("optimizer", {"learning_rate": float("nan")}, "it must be a finite number"),
        ("optimizer", {"betas": [0.9, 1.0]}, "betas.1 is 1.0: it must be less than 1"),
        ("schedule", {"steps": 1.5}, "schedule.steps is 1.5: it must be a valid integer"),
        ("schedule", {"warmup": 2}, "schedule.warmup is 2: it must be less than or equal to 1"),
        ("run", {"seed": -1}, "run.seed is -1"),
        ("run", {"checkpoint_every": -1}, "run.checkpoint_every is -1: it must be greater than or"),
    ],
)
def test_ranges(section, values, message):
    recipe = {"data": {"path": "x"}}
    recipe.setdefault(section, {}).update(values)
    with pytest.raises(ConfigError) as caught:
        config_from_dict(recipe, "here")
    assert str(caught.value).startswith("here: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--optimizer.learning-rate", "nan"], "optimizer.learning_rate is nan: it must be"),
        (["--schedule.steps", "0"], "command line: schedule.steps is 0: it must be greater than 0"),
    ],
)
def test_ranges_on_the_command_line(file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(file, override)


def test_round_trip(file):
    config = load_recipe(file, ["--sparsity.until", "{0.5: dense}", "--sparsity.pattern", "2:4"])
    file.write_text(to_yaml(config))
    assert load_recipe(file) == config


def test_identity_ignores_what_does_not_change_the_weights(file):
    one = load_recipe(file)
    same = load_recipe(file, ["--run.directory", "elsewhere", "--run.log-every", "3"])
    other = load_recipe(file, ["--optimizer.learning-rate", "0.5", "--run.seed", "1"])
    assert digest(one) == digest(same)
    assert digest(one) != digest(other)
    assert differences(one, other) == [
        "optimizer.learning_rate is 0.001 there and 0.5 here",
        "run.seed is 0 there and 1 here",
    ]


def test_help_names_every_option():
    text = options_help()
    for option in ("--optimizer.learning-rate", "--sparsity.until", "--run.directory"):
        assert option in text
    assert "Peak learning rate" in text


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
        "x" * 2**20,
        "data: {batch_size: " + "9" * 400 + "}",
    ],
)
def test_hostile_yaml(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1000


def test_from_pretrained_as_it_stands(chats, tmp_path):
    """Every value of the recipe but its sizes, by the command line, on conversations."""
    preset_model(0).save_pretrained(tmp_path / "model")
    recipe = next(path for path in RECIPES if path.name == "from-pretrained.yaml")
    options = {
        "model.source": tmp_path / "model",
        "teacher": tmp_path / "model",
        "data.path": chats,
        "data.sequence-length": 32,
        "data.batch-size": 8,
        "schedule.steps": 10,
        "run.directory": tmp_path / "run",
        "run.device": "cpu",
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    cli.main(["train", str(recipe), *arguments])
    *_, last, validation = rows(tmp_path / "run")
    assert last["quantization"] == 1 and last["teacher_loss"] > 0
    assert math.isfinite(validation["validation_loss"])
    assert (tmp_path / "run" / "model" / "config.json").is_file()
