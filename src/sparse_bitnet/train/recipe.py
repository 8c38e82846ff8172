"""Recipes: a YAML file first, then ``--section.key value`` from the command line.

Both go through one strict conversion, so a wrong key or value gets the same message wherever it was
written: the key, the place, the nearest key that exists.

YAML is read with the number rules of YAML 1.2. Version 1.1, PyYAML's own, reads ``6:8`` as the
sexagesimal number 368 and ``1e-3`` as text, both of which stand in every recipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import math
import re
import types
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from sparse_bitnet.core import ConfigError, PatternError, shown
from sparse_bitnet.train.config import DataConfig, TrainConfig

# What may differ between a run and its continuation: it changes neither weights nor losses.
# Of the section `run` that is all but these.
FREE_TO_CHANGE = {"data.micro_batch_size", "model.activation_checkpointing"}
DECIDES_WEIGHTS = {"run.seed", "run.precision"}
LARGEST_RECIPE = 2**20  # characters
MOST_PARTS = 100_000
LARGEST_WHOLE = 2**62


class _Loader(yaml.SafeLoader):
    """Safe YAML with the integers, floats and booleans of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe and lay command-line arguments over it.

    Args:
        path: a YAML file of sections ``model``, ``sparsity``, ``data``, ``optimizer``,
            ``schedule`` and ``run``; a field left out has its default.
        overrides: ``["--optimizer.learning-rate", "1e-3", "--run.seed=1", ...]``. Values are YAML
            too, so a mapping is written ``--sparsity.until '{0.5: dense}'``.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key (with the nearest valid one), a
            value of the wrong type or out of range.
    """
    values = read_yaml(path)
    config = {} if values is None else values
    built = _convert(TrainConfig, config, "", str(path))
    _lay(built, overrides)
    return _build(TrainConfig, built, str(path))


def read_yaml(path: str | Path) -> Any:
    """A YAML file by the number rules of YAML 1.2, in which ``6:8`` is text and ``1e-3`` a number.

    Raises:
        ConfigError: for a file that cannot be read or is not YAML.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_RECIPE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    if len(text) > LARGEST_RECIPE:
        raise ConfigError(f"recipe {path} is longer than {LARGEST_RECIPE} characters")
    return _parse(text, str(path))


def config_from_dict(values: dict[str, Any], place: str) -> TrainConfig:
    """The strict conversion alone, for a configuration kept as JSON or YAML elsewhere.

    Raises:
        ConfigError: as :func:`load_recipe`.
    """
    return _build(TrainConfig, _convert(TrainConfig, values, "", place), place)


def options_help(prog: str) -> str:
    """Every option with its type, default and meaning, as a person wants to read it."""
    default = TrainConfig(data=DataConfig(path="DIRECTORY"))
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(TrainConfig, args=["--help"], default=default, prog=prog)
    return text.getvalue()


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values, as YAML and JSON hold them."""
    return dataclasses.asdict(config)


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration as a recipe that :func:`load_recipe` reads back."""
    values = json.loads(json.dumps(to_dict(config)))  # tuples become lists
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def digest(config: TrainConfig) -> str:
    """sha256 of everything that decides the weights; runs with one digest are one run."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(there: TrainConfig, here: TrainConfig) -> list[str]:
    """One line for each field that decides the weights and differs."""
    old, new = identity(there), identity(here)
    return [
        f"{key} is {shown(old[key])} there and {shown(new[key])} here"
        for key in old
        if old[key] != new[key]
    ]


def identity(config: TrainConfig) -> dict[str, Any]:
    """Everything that decides the weights, flat: ``section.field`` → plain value."""
    flat = {}
    for section, values in to_dict(config).items():
        for name, value in values.items():
            key = f"{section}.{name}"
            if key in DECIDES_WEIGHTS or not (section == "run" or key in FREE_TO_CHANGE):
                flat[key] = json.loads(json.dumps(value))
    return flat


def _parse(text: str, place: str) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader)
        if _parts(value, {}) > MOST_PARTS:
            raise ValueError(f"written out, its aliases have more than {MOST_PARTS} parts")
        return value
    except Exception as error:  # YAML's own, and whatever a wrong date or a long number raises
        raise ConfigError(f"{place} is not YAML: {str(error)[:500]}") from error


def _parts(value: Any, known: dict[int, float]) -> float:
    """How many values a YAML value has, written out: infinitely many if it holds itself.

    Twelve lines of ``b: &b [*a, *a, …]`` stand for more than fit into any memory.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # until it is counted, which is for good if it holds itself
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_parts(one, known) for one in inside)
    return known[id(value)]


def _lay(built: dict[str, Any], overrides: Sequence[str]) -> None:
    """Read command-line arguments into a tree of checked values, over what stands there.

    ``--a.b-c value``, ``--a.b-c=value``; as tyro's help shows them, also ``--a.flag``,
    ``--a.no-flag`` and ``--optimizer.betas 0.9 0.95``.
    """
    rest = list(overrides)
    while rest:
        argument = rest.pop(0)
        if not re.match(r"--[A-Za-z]", argument):
            raise ConfigError(
                f"command line: {argument!r} stands where an option like "
                "--optimizer.learning-rate was expected"
            )
        name, equals, text = argument[2:].partition("=")
        key, off = _without_no(name.replace("-", "_"))
        hint = _hint(key)
        if off:
            value: Any = False
        elif equals:
            value = _parse(text, f"command line: --{name}")
        else:
            values = _take(rest, hint)
            if not values and hint is not bool:
                raise ConfigError(f"command line: --{name} needs a value")
            read = [_parse(value, f"command line: --{name}") for value in values]
            value = True if not read else read if len(read) > 1 else read[0]
        *parents, field = key.split(".")
        here = built
        for parent in parents:
            here = here.setdefault(parent, {})
        here[field] = _value(hint, value, key, "command line")


def _take(rest: list[str], hint: Any) -> list[str]:
    """The arguments that belong to an option: two for a pair, none needed for a flag, else one."""
    most = len(get_args(hint)) if get_origin(hint) is tuple else 1
    if hint is bool and rest and rest[0].lower() not in ("true", "false"):
        most = 0
    values: list[str] = []
    while rest and len(values) < most and not re.match(r"--[A-Za-z]", rest[0]):
        values.append(rest.pop(0))
        if values[-1].startswith("["):
            break
    return values


def _without_no(key: str) -> tuple[str, bool]:
    """``run.no_export`` is ``run.export``, off."""
    section, _, name = key.rpartition(".")
    positive = f"{section}.{name.removeprefix('no_')}"
    if name.startswith("no_") and _keys(TrainConfig, "").get(positive) is bool:
        return positive, True
    return key, False


def _hint(key: str) -> Any:
    """The type of a dotted key."""
    known = _keys(TrainConfig, "")
    parts = key.split(".")
    for end in range(1, len(parts) + 1):
        part = ".".join(parts[:end])
        if part not in known:
            raise ConfigError(
                f"command line: {part} is unknown; the nearest key is {_nearest(part)}"
            )
    return known[key]


def _convert(kind: type, values: Any, prefix: str, place: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        where = f" at {prefix.rstrip('.')}" if prefix else ""
        raise ConfigError(
            f"{place}{where}: expected a mapping of keys to values, found {shown(values)}"
        )
    result = {}
    for name, value in values.items():
        _check_key(kind, name, f"{prefix}{name}", place)
        result[name] = _value(_fields(kind)[name], value, f"{prefix}{name}", place)
    return result


def _build(kind: type, values: dict[str, Any], place: str) -> Any:
    made = {}
    for field in dataclasses.fields(kind):
        hint = _fields(kind)[field.name]
        if dataclasses.is_dataclass(hint):
            made[field.name] = _build(hint, values.get(field.name, {}), place)  # type: ignore[arg-type]
        elif field.name in values:
            made[field.name] = values[field.name]
    try:
        return kind(**made)
    except (ConfigError, PatternError) as error:
        raise type(error)(f"{place}: {error}") from error


@cache  # a sweep of a thousand cells asks a million times
def _fields(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_key(kind: type, name: Any, key: str, place: str) -> None:
    if name not in _fields(kind):
        raise ConfigError(f"{place}: {key} is unknown; the nearest key is {_nearest(key)}")


def _nearest(key: str) -> str:
    """The valid key most like an unknown one: by its last part, the same section preferred."""
    section, _, name = key.rpartition(".")

    def likeness(candidate: str) -> float:
        its_section, _, its_name = candidate.rpartition(".")
        alike = difflib.SequenceMatcher(None, name, its_name).ratio()
        return alike + 0.1 * (section == its_section)

    return max(_keys(TrainConfig, ""), key=likeness)


def _keys(kind: type, prefix: str) -> dict[str, Any]:
    """All dotted keys below a section, sections included, with their types."""
    keys = {}
    for name, hint in _fields(kind).items():
        keys[f"{prefix}{name}"] = hint
        if dataclasses.is_dataclass(hint):
            keys |= _keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def _value(hint: Any, value: Any, key: str, place: str) -> Any:
    """``value`` as the field's type, or an error that names both."""
    if dataclasses.is_dataclass(hint):
        return _convert(hint, value, f"{key}.", place)  # type: ignore[arg-type]
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _value(next(a for a in inner if a is not type(None)), value, key, place)
    if origin is Literal and not isinstance(value, (dict, list)):
        return value  # the section checks its choices and names them all
    if origin is dict and isinstance(value, dict):
        return {
            _value(inner[0], k, f"{key} (key)", place): _value(inner[1], v, f"{key}[{k}]", place)
            for k, v in value.items()
        }
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(inner):
        return tuple(_value(a, v, key, place) for a, v in zip(inner, value, strict=True))
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    small = not (type(value) is int and abs(value) > LARGEST_WHOLE)
    if hint is not float and isinstance(hint, type) and type(value) is hint and small:
        return value
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a directory named 2024, say
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    expected = wanted.get(hint, str(hint).replace("typing.", ""))
    raise ConfigError(f"{place}: {key} is {shown(value)}: it must be {expected}")
