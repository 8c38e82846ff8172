"""The linear weights of a checkpoint, read one at a time, with what training would make of them.

The model of the checkpoint's configuration is built on the meta device and converted there: which
matrices are linears, which stay as they are, and which hold several fused ones (shards, each with
a γ of its own) is known from ``convert`` alone.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_bitnet.core import CheckpointError, ConfigError, WeightError
from sparse_bitnet.estimate.estimate import empty_model
from sparse_bitnet.files import read_json, refuse_special
from sparse_bitnet.nn import convert, master_weights
from sparse_bitnet.train.checkpoint import MANIFEST
from sparse_bitnet.train.config import SparsityConfig
from sparse_bitnet.train.dense import is_gguf, read_gguf
from sparse_bitnet.train.export import is_trained, read_trained
from sparse_bitnet.train.recipe import config_from_dict

# What linears are not, by name, if no configuration tells: lookup tables, head, norms, routers.
NOT_LINEAR = re.compile(r"(embed|lm_head|norm|wte|wpe|position|(^|\.)(router|gate)\.weight$)")
INDEX = "model.safetensors.index.json"
PACKED = "a packed model has no master weights, give the directory it was packed from"


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model."""

    shape: tuple[int, ...]
    shard_sizes: tuple[int, ...] = ()  # rows of each matrix fused into a master weight, if several
    left_out: str = ""  # why it is no master weight; empty if it is


@dataclass(frozen=True)
class Architecture:
    """The parameters of a model by their names in it.

    Attributes:
        scales: how many γ a matrix has, and why, for people.
        parameters: name → what it is; empty where no configuration can be read.
        prefix: of the names inside the base model, which some checkpoints leave out.
    """

    scales: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    prefix: str = ""

    def find(self, name: str, shape: tuple[int, ...]) -> Parameter | None:
        """What a stored tensor is in the model; None if that has none of this name and shape."""
        named = [self.parameters.get(one) for one in (name, f"{self.prefix}.{name}")]
        return next(
            (parameter for parameter in named if parameter and parameter.shape == shape), None
        )


def read_architecture(source: str) -> Architecture:
    """That of a preset, a ``config.json`` or a directory that has one.

    Without parameters if transformers cannot build a model of it; ``scales`` has the reason then.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        return Architecture(
            "one for each matrix, whatever is fused into it: there is no config.json"
        )
    try:
        return _architecture(source)
    except (ConfigError, WeightError) as error:
        return Architecture(f"one for each matrix, whatever is fused into it, because {error}")


def _architecture(source: str) -> Architecture:
    model = empty_model(source, 1, torch.float32)  # rows of a preset's embeddings: any number
    skipped: dict[str, str] = {}
    # GPT-2, for example, has nothing to convert: every matrix of it is left out.
    with contextlib.suppress(ConfigError):
        skipped = convert(model, "dense").skipped
    shard_sizes = {weight.name: weight.shard_sizes for weight in master_weights(model)}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape, module = tuple(parameter.shape), name.rpartition(".")[0]
        if name in shard_sizes:
            parameters[name] = Parameter(shape, shard_sizes[name])
            continue
        kind = type(model.get_submodule(module)).__name__
        reason = skipped.get(module, f"it belongs to a {kind}, not to a plain nn.Linear")
        parameters[name] = Parameter(shape, left_out=reason)
    scales = f"as in training, by the configuration ({model.config.model_type})"
    return Architecture(scales, parameters, model.base_model_prefix)


def linear_weights(
    directory: Path, architecture: Architecture
) -> Iterator[tuple[str, Tensor, Parameter | None]]:
    """``(name, float32 weight, its parameter in the model)`` of every floating-point matrix.

    Where the model does not know a matrix, its name decides whether it may be a linear's.

    Raises:
        CheckpointError: for a damaged or packed file, or none.
    """
    # A training checkpoint holds the optimizer's moments too, each tensor under what it is.
    prefix = "model." if (directory / MANIFEST).is_file() else ""
    if is_gguf(directory):
        for name, tensor in read_gguf(directory)[0].named_parameters():
            parameter = architecture.find(name, tuple(tensor.shape))
            if parameter is not None and not parameter.left_out:
                yield name, tensor.detach(), parameter
        return
    for file in _weight_files(directory):
        try:
            refuse_special(file)
            with safe_open(file, framework="pt") as tensors:
                for stored in tensors.keys():  # noqa: SIM118  # it is no mapping
                    name = stored.removeprefix(prefix)
                    part = tensors.get_slice(stored)
                    shape, dtype = part.get_shape(), part.get_dtype()
                    parameter = architecture.find(name, tuple(shape))
                    trained = parameter is not None and not parameter.left_out
                    if not stored.startswith(prefix) or (NOT_LINEAR.search(name) and not trained):
                        continue
                    if len(shape) not in (2, 3) or 0 in shape:
                        continue
                    if dtype.startswith(("U", "I")) and name.endswith("weight"):
                        raise CheckpointError(f"{file}: {name} is of integers ({dtype}); {PACKED}")
                    if (weight := tensors.get_tensor(stored)).is_floating_point():
                        yield name, weight.float(), parameter
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    """The files of the model: what the index lists, and not all that somebody put beside them."""
    if directory.is_file():
        return [directory]
    index, single = directory / INDEX, directory / "model.safetensors"
    if index.is_file():
        try:
            names = sorted({Path(name).name for name in read_json(index)["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from error
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of the {len(names)} files that {INDEX} lists, "
                f"{missing[0]} among them; fetch the whole model"
            )
        return [directory / name for name in names]
    if single.exists():
        return [single]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{directory} has no *.safetensors; give a trained run, a Hugging Face directory saved "
            "as safetensors, or one such file"
        )
    return files


def model_directory(path: Path) -> Path:
    """Where the weights lie: a run keeps them in ``model/``."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a directory or a safetensors file")
    return path / "model" if (path / "model").is_dir() else path


def trained_as(directory: Path) -> tuple[SparsityConfig | None, str]:
    """What the linears of a model trained here became, None for any other; and the model's source
    where that is not the directory itself."""
    if is_trained(directory):
        return read_trained(directory).sparsity, ""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return None, ""
    try:
        values = read_json(manifest)
        ranks, config = values["ranks"], config_from_dict(values["config"], str(manifest))
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest} is damaged or foreign: {error}") from error
    if ranks != 1:
        raise CheckpointError(
            f"{directory} is a checkpoint of {ranks} ranks, each weight in pieces; give the model/ "
            "directory that the run writes at its end"
        )
    return config.sparsity, config.model.source
