"""Recipes: a YAML file first, then ``--section.key value`` from the command line.

The command line is tyro's, with the file's values as defaults. Pydantic checks the result, and a
configuration that a checkpoint or a sweep brings: a wrong key or value is named with its place.

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
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from sparse_bitnet.core import ConfigError, shown
from sparse_bitnet.train.config import STRICT, DataConfig, TrainConfig

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
    if not overrides:
        return config
    return config_from_dict(to_dict(_parse_arguments(overrides, config)), "command line")


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
    return checked(TrainConfig, values, place)


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
        return checked(info.type, parse_yaml(arguments[0], "it"), "command line")

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


def checked(kind: type[T], values: Any, place: str) -> T:
    """A dataclass from plain values: an unknown key, a wrong type or value is an error.

    Args:
        values: plain values, or JSON in bytes.
        place: named in errors, a file for example.

    Raises:
        ConfigError: naming ``place``, the keys and what was expected.
    """
    adapter = _adapter(kind)  # type: ignore[arg-type]  # it is hashable
    read = adapter.validate_json if isinstance(values, bytes) else adapter.validate_python
    try:
        return read(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        problems = "; ".join(_problem(kind, one) for one in found[:3])
        raise ConfigError(f"{place}: {problems}".removeprefix(": ")) from None


def _problem(kind: Any, error: Any) -> str:
    loc = error["loc"]
    key = ".".join(part if isinstance(part, str) else shown(part) for part in loc)
    if error["type"] == "unexpected_keyword_argument":
        names = [one.name for one in dataclasses.fields(_type_at(kind, loc[:-1])) if one.init]
        near = difflib.get_close_matches(str(loc[-1])[:100], names, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(names)}"
        return f"{key[:100]} is unknown; {hint}"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "it must")
    if error["type"] in ("value_error", "json_invalid"):  # raised by one of our dataclasses
        return f"{key}: {message}".removeprefix(": ")
    is_schedule = error["type"] == "dict_type" and _type_at(kind, loc) == dict[float, str]
    form = " such as '{0.5: dense}'" if is_schedule else ""
    return f"{key or 'it'} is {shown(error['input'])}: {message}{form}"


def _type_at(kind: Any, loc: Sequence[Any]) -> Any:
    """The type at a place in nested dataclasses; of ``Form | None`` the dataclass."""
    for part in loc:
        kind = get_type_hints(kind).get(part, kind) if dataclasses.is_dataclass(kind) else kind
        kind = next(filter(dataclasses.is_dataclass, get_args(kind)), kind)
    return kind


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=None if dataclasses.is_dataclass(kind) else STRICT)
