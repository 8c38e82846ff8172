"""Verification of a packed directory before loading: complete, unchanged, made for this model.

transformers leaves tensors that it does not find random and prints a table; here everything that
does not fit is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_bitnet import files
from sparse_bitnet.core import ConfigError, PackedFormatError, WeightError, check_finite
from sparse_bitnet.nn.packed_module import StoredModule
from sparse_bitnet.nn.record import name_in, refuse_files_of_others
from sparse_bitnet.packed.config import HINT
from sparse_bitnet.packed.tensor_file import REMEDY, read_tensors, verify_checksums

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {torch.float32, torch.bfloat16, torch.float16}
SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


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


def check_output(out: Path, what: str, is_such: Callable[[Path], bool], overwrite: bool) -> None:
    """Refuse to replace what exists: without ``overwrite`` anything, with it what is not such a
    thing as will be written, and a directory with files of others.

    Args:
        out: file or directory that will be written.
        what: "a packed model".
        is_such: whether a path is one.

    Raises:
        ConfigError: naming it, or a file in it that would be lost; for the current directory.
    """
    if out.is_dir() and out.samefile("."):
        raise ConfigError(f"{out} is the current directory, which would be replaced; name another")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_such(out):
        raise ConfigError(f"{out} exists and is not {what}; give another name, or remove it first")
    refuse_files_of_others(out)
    if not overwrite:
        raise ConfigError(
            f"{out} exists; give another name, or replace it with --overwrite (in Python "
            "overwrite=True)"
        )


def is_stored_as(directory: Path, method: str | None) -> bool:
    """True if a readable ``config.json`` has that ``quant_method``, or None if that is None."""
    with suppress(PackedFormatError):
        return (directory / CONFIG).is_file() and quant_method(directory) == method
    return False


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

    Bytes and scales have one dtype; other floats may be stored in any that models compute in.

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
                here not in exact and tensor.dtype in FLOATS and wanted.dtype.is_floating_point
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
        for name, tensor in file.tensors.items():
            if tensor.is_floating_point():
                try:
                    check_finite(tensor)
                except WeightError as error:
                    raise PackedFormatError(
                        f"{file.path}: tensor {name} holds NaN or infinity; the file was edited or "
                        f"damaged, {REMEDY}"
                    ) from error


def is_outside(model: nn.Module, name: str) -> bool:
    """Does a stored name belong to the head, and this is a base model without one?"""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and not hasattr(model, prefix) and not name.startswith(f"{prefix}.")
