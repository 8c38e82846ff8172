"""What a configuration tells about the matrices of a checkpoint: those that training would take.

The model is built on the meta device and converted there, so that what is a linear layer, what
stays as it is, and which rows have a γ of their own is known from ``convert`` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sparse_bitnet.core import ConfigError, WeightError
from sparse_bitnet.estimate.estimate import empty_model
from sparse_bitnet.nn import convert, master_weights


@dataclass(frozen=True)
class Place:
    """A parameter of the model.

    Attributes:
        shape: of the parameter.
        segments: rows of each logical matrix fused into a master weight; empty for one matrix.
        left: why it is no master weight; empty if it is.
    """

    shape: tuple[int, ...]
    segments: tuple[int, ...] = ()
    left: str = ""


@dataclass(frozen=True)
class Layout:
    """The parameters of a model by their names in it.

    Attributes:
        scales: how many γ a matrix has, and why, for people.
        places: name → what it is; empty where no configuration can be read.
        prefix: of the names inside the base model, which some checkpoints leave out.
    """

    scales: str
    places: Mapping[str, Place] = field(default_factory=dict)
    prefix: str = ""

    def find(self, name: str, shape: tuple[int, ...]) -> Place | None:
        """What a stored tensor is in the model; None if that has none of this name and shape."""
        named = [self.places.get(one) for one in (name, f"{self.prefix}.{name}")]
        return next((place for place in named if place and place.shape == shape), None)


def read_layout(source: str) -> Layout:
    """The layout of a preset, a ``config.json`` or a directory that has one.

    Without one that transformers can build a model of, a layout that knows no name and says so.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        return Layout("one for each matrix, whatever is fused into it: there is no config.json")
    try:
        return _layout(source)
    except (ConfigError, WeightError) as error:
        return Layout(f"one for each matrix, whatever is fused into it, because {error}")


def _layout(source: str) -> Layout:
    model = empty_model(source, 1, torch.float32)  # rows of a preset's embeddings: any number
    skipped: dict[str, str] = {}
    # GPT-2, for example, has nothing to convert: every matrix of it is left out.
    with contextlib.suppress(ConfigError):
        skipped = convert(model, "dense").skipped
    segments = {weight.name: weight.segments for weight in master_weights(model)}
    places = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape, module = tuple(parameter.shape), name.rpartition(".")[0]
        if name in segments:
            places[name] = Place(shape, segments[name])
            continue
        kind = type(model.get_submodule(module)).__name__
        reason = skipped.get(module, f"it belongs to a {kind}, not to a plain nn.Linear")
        places[name] = Place(shape, left=reason)
    scales = f"as in training, by the configuration ({model.config.model_type})"
    return Layout(scales, places, model.base_model_prefix)
