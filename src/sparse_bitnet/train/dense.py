"""Load dense Hugging Face directories and GGUF files safely: no remote code, no network, no random
weights.

transformers is made for models that one trusts. It offers to run code that a directory brings,
fetches a kernel that a ``config.json`` names, and gives a weight that the files lack random values
and a line in a table. Here each of them is an error.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from sparse_bitnet.core import CheckpointError, MissingExtraError, check_finite, shown
from sparse_bitnet.files import read_json, refuse_special
from sparse_bitnet.nn.record import SIDE_FILE, forget
from sparse_bitnet.train.checksums import checksums, find_damage

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""For ``from_pretrained``; left out, it asks the person at the terminal whether to run code."""
MOST_LAYERS = 10_000
MOST_READS = 2**22  # numbers and strings in a GGUF header; a vocabulary of 200,000 takes 1.5 M


IMPORT_FIRST = "is a GGUF file; make a directory of it first (sparse-bitnet import FILE DIRECTORY)"


def read_dense(directory: str | Path, exact: bool = False, **options: Any) -> PreTrainedModel:
    """The float32 causal language model of a directory, on the CPU, in evaluation mode.

    Of a converted model's directory, the dense model of its master weights.

    Args:
        directory: as ``save_pretrained`` writes it.
        exact: refuse tensors that the model has no place for, too. Checkpoints of others often hold
            some, those that we write never.
        options: for ``from_pretrained``.

    Raises:
        CheckpointError: if the directory cannot be read, lacks a weight, holds NaN or infinity,
            names code to be fetched, or is a trained model that has changed since.
    """
    directory = Path(directory)
    check_has_model(directory)
    try:
        _check_config(directory)
        _check_sums(directory)
        config = AutoConfig.from_pretrained(directory, **LOCAL)
        forget(config)
        options |= {"config": config, "dtype": torch.float32, "output_loading_info": True}
        with no_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(directory, **LOCAL, **options)
        model: PreTrainedModel
        model, report = loaded
        for what, names in (
            ("missing from the files", report["missing_keys"]),
            ("in the files, but not in the model", report["unexpected_keys"] if exact else ()),
        ):
            if names:
                raise ValueError(
                    f"{len(names)} weights of the {type(model).__name__} that config.json "
                    f"describes are {what}, {min(names)} for example"
                )
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                check_finite(tensor, name)
    except Exception as error:  # safetensors, torch and transformers each have their own
        raise CheckpointError(
            f"{directory} cannot be loaded: {str(error)[:500]}; get its files again"
        ) from error
    return model.eval()


def check_has_model(directory: Path) -> None:
    """Refuse a directory without ``config.json``, and name the model of a training run.

    Raises:
        CheckpointError: saying what the directory is instead.
    """
    if not (directory / "config.json").is_file():
        inside = directory / "model"
        if (inside / "config.json").is_file():
            raise CheckpointError(f"{directory} is a training run; give its model, {inside}")
        why = "there is no config.json" if directory.exists() else "it does not exist"
        raise CheckpointError(f"{directory} holds no model: {why}")


def is_gguf(path: str | Path) -> bool:
    """True for a file named ``*.gguf``, or that begins as GGUF files do."""
    path = Path(path)
    return path.is_file() and (path.suffix.lower() == ".gguf" or begins_as_gguf(path))


def begins_as_gguf(path: Path) -> bool:
    """True for a file that begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file in float32, as transformers dequantizes it, and its tokenizer.

    transformers does not save what it dequantized itself, so the tensors go into a fresh model. Of
    the files beside it nothing is read.

    Raises:
        MissingExtraError: without the package ``gguf``.
        CheckpointError: if transformers cannot read the file, a tensor of its architecture is not
            there, or a value is NaN or infinite.
    """
    gguf_package("reading")
    try:
        with _alone(Path(path)) as place, no_bars():
            shape, tensors = _read_gguf_shape(place)
            # transformers would make all that the header describes before it looks for a tensor.
            with torch.device("meta"):
                described = AutoModelForCausalLM.from_config(shape).num_parameters()
            if described > sum(tensor.n_elements for tensor in tensors):
                raise ValueError(f"it describes {described:,} weights and has not as many")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config=shape, dtype=torch.float32, output_loading_info=True, **place
            )  # with its configuration at hand it parses the header once and not twice
            read, info = loaded
            if info["missing_keys"]:
                raise ValueError(f"it has no tensor for {min(info['missing_keys'])}")
            tokenizer = AutoTokenizer.from_pretrained(**place)
        values = read.config.to_dict()
        values.pop("quantization_config", None)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            type(read.config).from_dict(values)
        )
        model.load_state_dict(read.state_dict())
        for name, tensor in model.state_dict().items():
            check_finite(tensor, name)
    except Exception as error:  # gguf, transformers and torch each have their own
        raise CheckpointError(f"{path} cannot be read: {str(error)[:500]}") from error
    return model.eval(), tokenizer


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[dict[str, Any]]:
    """``from_pretrained``'s arguments for a GGUF file, without the files beside it.

    transformers looks for the name in the current directory first, so it is one of its own.
    """
    with tempfile.TemporaryDirectory() as directory:
        name = f"{Path(directory).name}.gguf"
        (Path(directory) / name).symlink_to(path.resolve())
        yield {"pretrained_model_name_or_path": directory, "gguf_file": name, **LOCAL}


def _read_gguf_shape(place: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The configuration and the tensors that a header describes, if it fits into its file."""
    gguf: Any = gguf_package("reading")

    class Bounded(gguf.GGUFReader):
        """The package's own reader follows a count beyond the end of the file for ever."""

        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **orders: Any) -> Any:
            self.reads += 1
            end = offset + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data) or self.reads > MOST_READS:
                raise ValueError("it is cut off, or its header is longer than that of any model")
            return super()._get(offset, dtype, count, *order, **orders)

    header = Bounded(Path(place["pretrained_model_name_or_path"]) / place["gguf_file"])
    tensors = list(header.tensors)

    def check(layers: Any) -> None:
        if type(layers) is not int or not 0 <= layers <= min(len(tensors), MOST_LAYERS):
            raise ValueError(f"it describes {shown(layers)} layers and has {len(tensors)} tensors")

    for name, field in header.fields.items():
        if name.endswith(".block_count"):
            check(field.contents())
    shape = AutoConfig.from_pretrained(**place)
    check(shape.num_hidden_layers)
    return shape, tensors


def gguf_package(what: str = "exporting to") -> Any:
    """The package ``gguf``.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            f"{what} GGUF needs the package gguf: pip install 'sparse-bitnet[gguf]'"
        ) from error
    return gguf


def read_shape(path: str | Path) -> Any:
    """The transformers configuration of a ``config.json``, a directory that has one, or a GGUF
    file.

    Raises:
        OSError, CheckpointError: if there is none.
        ValueError: if it is damaged, names code to be fetched, or has more layers than any model.
        MissingExtraError: for a GGUF file, without the package ``gguf``.
    """
    path = Path(path)
    if path.is_dir():
        check_has_model(path)
    if is_gguf(path):
        with _alone(path) as place, no_bars():
            return _read_gguf_shape(place)[0]
    config = _read_config(path / "config.json" if path.is_dir() else path)
    layers = config.get("num_hidden_layers", 0)
    if type(layers) is not int or not 0 <= layers <= MOST_LAYERS:
        # transformers would first make that many.
        raise ValueError(f"num_hidden_layers is {shown(layers)}, more than any model has")
    return AutoConfig.from_pretrained(path, **LOCAL)


def foreign_code(config: Any) -> str | None:
    """What of a ``config.json`` would make transformers fetch code, or None.

    An implementation with a slash in it is a repository of compiled kernels.
    """
    parts = [config]
    while parts:
        part = parts.pop()
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        for key, value in part.items() if isinstance(part, dict) else ():
            names = value.values() if isinstance(value, dict) else [value]
            if key.endswith("_implementation") and any("/" in str(name) for name in names):
                return f"{key} is {str(value)[:100]}, a repository of code"
    return None


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' own progress bars: one file, read or written in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_config(directory: Path) -> None:
    """Check what transformers would build from a directory, and read of it, before it does."""
    refuse_special(*directory.iterdir())
    for index in directory.glob("*.index.json"):
        for name in read_json(index)["weight_map"].values():
            if Path(name).name != name:
                raise ValueError(f"{index.name} names {shown(name)}, which is no file beside it")
    config = _read_config(directory / "config.json")
    files = sorted(directory.glob("*.safetensors"))
    if files:  # older checkpoints are pickles, which transformers reads as weights only
        tensors = 0
        for file in files:
            with safe_open(file, framework="pt") as opened:
                tensors += len(opened.keys())
        layers = config.get("num_hidden_layers", 0)
        if type(layers) is not int or not 0 <= layers <= tensors:
            raise ValueError(
                f"num_hidden_layers is {str(layers)[:40]}, but there are {tensors} tensors in the "
                "weight files"
            )


def _check_sums(directory: Path) -> None:
    """Compare weight files with the checksums that a trained model has (since version 0.2)."""
    side = directory / SIDE_FILE
    expected = read_json(side).get("files") if side.is_file() else None
    if expected is None:
        return
    if damage := find_damage(directory, expected, partial(checksums, directory)):
        raise ValueError(f"{damage}; the weights were damaged or edited since they were written")


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    reason = foreign_code(config)
    if reason:
        raise ValueError(f"{path.name}: {reason}")
    return config
