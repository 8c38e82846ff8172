"""Verification of a packed directory before loading: complete, unchanged, made for this model.

transformers leaves tensors that it does not find random and prints a table; here everything that
does not fit is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from sparse_bitnet import files
from sparse_bitnet.core import ConfigError, PackedFormatError
from sparse_bitnet.nn.packed_module import StoredModule
from sparse_bitnet.packed.config import HINT
from sparse_bitnet.packed.tensor_file import REMEDY, read_tensors, verify_checksums

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# What this package and transformers write into the directory of a language model.
WRITTEN = re.compile(
    r"(generation_)?config\.json|sparse_bitnet\.json|hf_plugin\.py|polarization|"
    r"model.*\.safetensors(\.index\.json)?|tokenizer.*|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.(json|txt)|merges\.txt|.*\.model|"
    r"chat_template\.(jinja|json)|additional_chat_templates"
)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file of a packed directory.

    Raises:
        PackedFormatError: if it is missing, absurdly large, or not a JSON object.
    """
    try:
        value = files.read_json(path)
        if not isinstance(value, dict):
            raise ValueError("not valid JSON: it is not an object")
    except OSError as error:
        raise PackedFormatError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    except ValueError as error:
        raise PackedFormatError(f"{path}: {error}; {REMEDY}") from None
    return value


def quant_method(directory: Path) -> object:
    """What a directory's ``config.json`` says of how its weights are stored; None if nothing.

    Raises:
        PackedFormatError: if there is a ``config.json`` and it is damaged.
    """
    if not (directory / CONFIG).exists():
        return None
    described = read_json(directory / CONFIG).get("quantization_config")
    return described.get("quant_method") if isinstance(described, dict) else None


def check_target(out: Path, method: str, what: str) -> None:
    """Refuse to replace what is no model of that ``quant_method``, or holds files of others.

    Raises:
        ConfigError: naming the directory, or one of the files.
    """
    if out.exists() and not (
        out.is_dir() and (not any(out.iterdir()) or quant_method(out) == method)
    ):
        raise ConfigError(
            f"{out} exists and is not {what}; give a new directory, or remove it first"
        )
    refuse_foreign(out)


def refuse_foreign(directory: Path) -> None:
    """Refuse to replace a model's directory, if there is one, that has somebody else's files in it.

    Raises:
        ConfigError: naming one of them.
    """
    for path in sorted(directory.iterdir()) if directory.exists() else ():
        if not WRITTEN.fullmatch(path.name):
            raise ConfigError(
                f"{directory} holds {path.name}, which would be lost: the whole directory is "
                "replaced; move it away, or give a new directory"
            )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, none of them outside of it.

    Raises:
        PackedFormatError: if there are none, or if the index is damaged or names other places.
    """
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (directory / INDEX).exists():
        raise PackedFormatError(f"{directory}: there is neither {WEIGHTS} nor {INDEX}; {REMEDY}")
    index = read_json(directory / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PackedFormatError(f"{directory / INDEX}: there is no weight_map; {REMEDY}")
    if not isinstance(index.get("metadata"), dict):
        raise PackedFormatError(f"{directory / INDEX}: there is no metadata; {REMEDY}")
    for name in weight_map.values():
        check_shard_name(name, directory / INDEX)
    return [directory / name for name in sorted(set(weight_map.values()))]


def check_shard_name(name: object, where: Path) -> None:
    """Refuse a file name that packing never writes: paths above all.

    Raises:
        PackedFormatError: naming ``where`` and the name.
    """
    if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
        raise PackedFormatError(
            f"{where}: {str(name)[:200]!r} is not the name of a weight file, such as "
            f"model-00001-of-00002.safetensors; the index was edited or damaged, {REMEDY}"
        )


def verify_files(paths: Iterable[Path], model: nn.Module) -> None:
    """Check weight files against a model with (empty) packed modules, then their checksums.

    Bytes and scales have one dtype; other floats may be stored in any.

    Raises:
        PackedFormatError: naming the file and what is wrong with it.
    """
    opened = [read_tensors(path) for path in paths]
    expected = model.state_dict()
    exact = {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if isinstance(module, StoredModule)
        for key in module.exact_buffers()
    }
    missing = set(expected)
    for file in opened:
        for name, tensor in file.tensors.items():
            here = name_in(model, name, expected)
            if name == HINT or (here is None and is_outside(model, name)):
                continue
            if here is None:
                raise PackedFormatError(
                    f"{file.path}: tensor {name[:200]!r} belongs to no module of a "
                    f"{type(model).__name__} with this config.json; the two are of different "
                    f"models, {REMEDY}"
                )
            if here not in missing:
                raise PackedFormatError(f"{file.path}: tensor {name} is there twice; {REMEDY}")
            missing.remove(here)
            wanted = expected[here]
            fits = tensor.dtype == wanted.dtype or (
                here not in exact
                and tensor.dtype.is_floating_point
                and wanted.dtype.is_floating_point
            )
            if tensor.shape != wanted.shape or not fits:
                raise PackedFormatError(
                    f"{file.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, but "
                    f"config.json asks for {wanted.dtype} {list(wanted.shape)}; one of the two was "
                    f"edited, {REMEDY}"
                )
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for pair in tied.items():
        if not missing.issuperset(pair):  # one of the two is enough
            missing.difference_update(pair)
    if missing:
        places = ", ".join(file.path.name for file in opened)
        raise PackedFormatError(
            f"{opened[0].path.parent}: {len(missing)} tensors of the model are missing from "
            f"{places}, {min(missing)} for example; {REMEDY}"
        )
    for file in opened:
        verify_checksums(file)


def name_in(model: nn.Module, name: str, known: Iterable[str]) -> str | None:
    """A stored name as this model calls it: a base model has no prefix, a full model has one."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in known:
            return candidate
    return None


def is_outside(model: nn.Module, name: str) -> bool:
    """Does a stored name belong to the head, and this is a base model without one?"""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and not hasattr(model, prefix) and not name.startswith(f"{prefix}.")
