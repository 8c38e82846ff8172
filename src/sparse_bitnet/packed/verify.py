"""Verification of a packed directory before loading: complete, unchanged, made for this model.

transformers leaves tensors that it does not find random and prints a table; here everything that
does not fit is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_bitnet import files
from sparse_bitnet.core import ConfigError, PackedFormatError
from sparse_bitnet.nn.int8_head import Int8Table
from sparse_bitnet.nn.packed_module import PackedModule
from sparse_bitnet.packed.config import HINT
from sparse_bitnet.packed.tensor_file import (
    REMEDY,
    TensorFile,
    read_tensors,
    verify_checksums,
)

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

    Raises:
        PackedFormatError: naming the file and what is wrong with it.
    """
    opened = [read_tensors(path) for path in paths]
    _check_tensors(opened, model)
    for file in opened:
        verify_checksums(file)


def _check_tensors(opened: list[TensorFile], model: nn.Module) -> None:
    expected = dict(model.state_dict())
    exact = {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if isinstance(module, PackedModule | Int8Table)
        for key, buffer in module.named_buffers(recurse=False)
        if not buffer.is_floating_point() or key.endswith("_scale")
    }
    found: dict[str, Path] = {}
    for file in opened:
        path = file.path
        for name, tensor in file.tensors.items():
            if name == HINT:
                continue
            here = name_in(model, name, expected)
            if here is None:
                if is_outside(model, name):
                    continue
                raise PackedFormatError(
                    f"{path}: tensor {name[:200]!r} belongs to no module of a "
                    f"{type(model).__name__} with this config.json; the two are of different "
                    f"models, {REMEDY}"
                )
            if here in found:
                raise PackedFormatError(
                    f"{path}: tensor {name} is in {found[here].name} too; {REMEDY}"
                )
            _check_tensor(path, name, tensor, expected[here], here in exact)
            found[here] = path
    missing = expected.keys() - found.keys()
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, source in tied.items():
        if target in found or source in found:
            missing -= {target, source}
    if missing:
        places = ", ".join(file.path.name for file in opened)
        raise PackedFormatError(
            f"{opened[0].path.parent}: {len(missing)} tensors of the model are missing from "
            f"{places}, {min(missing)} for example; {REMEDY}"
        )


def _check_tensor(path: Path, name: str, found: Tensor, wanted: Tensor, exact: bool) -> None:
    """Bytes and scales have one dtype; other floats may be stored in any."""
    fits = found.dtype == wanted.dtype or (
        not exact and found.dtype.is_floating_point and wanted.dtype.is_floating_point
    )
    if found.shape != wanted.shape or not fits:
        raise PackedFormatError(
            f"{path}: tensor {name} is {found.dtype} {list(found.shape)}, but config.json asks for "
            f"{wanted.dtype} {list(wanted.shape)}; one of the two was edited, {REMEDY}"
        )


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
