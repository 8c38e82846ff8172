"""Recipes: a YAML file first, then ``--section.key value`` from the command line.

The file is converted strictly, and so is a configuration that a checkpoint or a sweep brings: a
wrong key or value is named with its place. The command line is tyro's, with the file's values as
defaults.

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
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from sparse_bitnet.core import ConfigError, PatternError, shown
from sparse_bitnet.train.config import DataConfig, TrainConfig

# What may differ between a run and its continuation: it changes neither weights nor losses.
# Of the section `run` that is all but these.
FREE_TO_CHANGE = {"data.micro_batch_size", "model.activation_checkpointing", "teacher.device"}
DECIDES_WEIGHTS = {"run.seed", "run.precision"}
PROGRAM = "sparse-bitnet train RECIPE.yaml"
T = TypeVar("T")


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
        path: a YAML file of sections ``model``, ``sparsity``, ``teacher``, ``data``, ``optimizer``,
            ``schedule`` and ``run``; a field left out has its default.
        overrides: ``["--optimizer.learning-rate", "1e-3", "--run.no-export", ...]``. A mapping is
            written in YAML: ``--sparsity.until '{0.5: dense}'``.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key (with the nearest valid one), a
            value of the wrong type or out of range.
        SystemExit: for wrong overrides, or ``--help`` among them, once tyro has said what is wrong.
    """
    config = config_from_dict(read_yaml(path) or {}, str(path))
    return _parse_arguments(overrides, config) if overrides else config


def read_yaml(path: str | Path) -> Any:
    """A YAML file by the number rules of YAML 1.2, in which ``6:8`` is text and ``1e-3`` a number.

    Raises:
        ConfigError: for a file that cannot be read or is not YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, place: str) -> Any:
    """YAML text by the same rules.

    Raises:
        ConfigError: naming ``place``.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # YAML's own, and whatever a wrong date or a long number raises
        raise ConfigError(f"{place} is not YAML: {str(error)[:500]}") from error


def config_from_dict(values: Any, place: str) -> TrainConfig:
    """The strict conversion alone, for a configuration kept as JSON or YAML elsewhere.

    Raises:
        ConfigError: as :func:`load_recipe`.
    """
    return section(TrainConfig, values, place)


def options_help() -> str:
    """Every option with its type, default and meaning, as a person wants to read it."""
    default = TrainConfig(data=DataConfig(path="DIRECTORY"))
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _parse_arguments(["--help"], default)
    return text.getvalue()


def _parse_arguments(arguments: Sequence[str], default: TrainConfig) -> TrainConfig:
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_mappings_are_yaml)
    arguments = [re.sub(r"^--teacher(?=$|=)", "--teacher.source", one) for one in arguments]
    return tyro.cli(TrainConfig, args=arguments, default=default, prog=PROGRAM, registry=registry)


def _mappings_are_yaml(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """A mapping is one argument: ``'{0.5: dense}'``."""
    if get_origin(info.type) is not dict:
        return None

    def read(arguments: list[str]) -> Any:
        return value_of(info.type, parse_yaml(arguments[0], "it"), "mapping", "command line")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{KEY: VALUE}",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [yaml.safe_dump(value, default_flow_style=True).strip()],
    )


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


def section(kind: type[T], values: Any, place: str, prefix: str = "") -> T:
    """A dataclass from a mapping of its fields, strictly.

    Args:
        place: named in errors, a file for example.
        prefix: of the keys, ``optimizer.`` for example.

    Raises:
        ConfigError: for an unknown key or a value of the wrong type; and whatever ``kind`` raises.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            f"{place}: {prefix.rstrip('.') or 'it'}: expected a mapping, found {shown(values)}"
        )
    fields, made = _fields(kind), {}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in fields:
            key = name if isinstance(name, str) else shown(name)
            near = difflib.get_close_matches(key[:100], fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(fields)}"
            raise ConfigError(f"{place}: {prefix}{key} is unknown; {hint}")
        made[name] = value_of(fields[name], value, f"{prefix}{name}", place)
    try:
        return kind(**made)
    except (ConfigError, PatternError) as error:
        raise type(error)(f"{place}: {error}") from error


def value_of(hint: Any, value: Any, key: str, place: str) -> Any:
    """A plain value as a field's type.

    Raises:
        ConfigError: naming the key and the type, for a value that is none.
    """
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return section(hint, value, place, f"{key}.")  # type: ignore[arg-type]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is types.UnionType:  # a type or None
        return None if value is None else value_of(inner[0], value, key, place)
    if origin is Literal and not isinstance(value, dict | list):
        return value  # the section checks its choices and names them all
    if origin is list and isinstance(value, list):
        return [value_of(inner[0], v, f"{key}[{i}]", place) for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {
            value_of(inner[0], k, f"{key} (key)", place): value_of(
                inner[1], v, f"{key}[{k}]", place
            )
            for k, v in value.items()
        }
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(inner):
        return tuple(value_of(a, v, key, place) for a, v in zip(inner, value, strict=True))
    if hint is float and type(value) in (int, float, str):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    elif hint is str and type(value) in (int, float):
        return str(value)  # a directory named 2024, say
    elif isinstance(hint, type) and type(value) is hint:
        return value
    if origin is dict:
        form = "{0.5: dense}" if inner == (float, str) else "{name: value}"
        raise ConfigError(
            f"{place}: {key} is {shown(value)}: it must be a mapping such as '{form}'"
        )
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    expected = "a list" if origin is list else wanted.get(hint, str(hint).replace("typing.", ""))
    raise ConfigError(f"{place}: {key} is {shown(value)}: it must be {expected}")


@cache  # a sweep of a thousand cells asks a million times
def _fields(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
