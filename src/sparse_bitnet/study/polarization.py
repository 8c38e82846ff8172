"""How far the weights of a model have polarized, layer by layer.

Works on whatever holds master weights: a training run, its ``model/``, a Hugging Face directory, a
GGUF file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparse_bitnet.console import progress, say
from sparse_bitnet.core import CheckpointError, Pattern, Polarization, polarization
from sparse_bitnet.files import write_text
from sparse_bitnet.nn import Conversion, MasterWeight, convert, master_weights
from sparse_bitnet.packed.load import is_packed
from sparse_bitnet.train.dense import is_gguf, read_dense, read_gguf
from sparse_bitnet.train.export import is_trained, read_trained
from sparse_bitnet.train.model import convert_model

# A dense model is measured with the pattern that it could be masked to.
PROBE = Pattern(6, 8)
DIGITS = 5
FRACTIONS = {"zeros_before_mask": "zeros before the mask", "dead_zone_groups": "lose nothing"}
STATISTICS = [field.name for field in dataclasses.fields(Polarization)]

# Plain values of one weight matrix, or of several pooled: the fields of Polarization; of one also
# name, shape, shard_sizes (rows of the matrices fused into it, empty for one) and the pattern of
# the thresholds.
Layer = dict[str, Any]


def pool(layers: Sequence[Layer]) -> Layer:
    """Statistics of several matrices together, each by its number of weights.

    Histograms are exact (each matrix counts in units of its own γ); kurtosis is the mean over the
    matrices.
    """
    sizes = [math.prod(layer["shape"]) for layer in layers]

    return {
        name: np.average([layer[name] for layer in layers], axis=0, weights=sizes).tolist()
        for name in STATISTICS
    }


def rounded(layer: Layer) -> Layer:
    """To the digits that a plot can show."""
    return layer | {name: np.round(layer[name], DIGITS).tolist() for name in STATISTICS}


def block_number(name: str) -> int | None:
    """Index of the decoder block in a parameter's name; None outside the blocks."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.", name)
    return int(found[1]) if found else None


@torch.no_grad()
def measure(weight: MasterWeight) -> Layer:
    """Dense weights get the thresholds of 6:8, where 8 divides their rows, to be compared by."""
    pattern, shape = weight.pattern, list(weight.weight.shape)
    if pattern.is_dense and shape[-1] % PROBE.m == 0:
        pattern = PROBE
    return {
        "name": weight.name,
        "shape": shape,
        "pattern": str(pattern),
        "shard_sizes": list(weight.shard_sizes),
        **dataclasses.asdict(polarization(weight.weight, pattern, weight.shard_sizes)),
    }


def _blocks(layers: Sequence[Layer]) -> dict[int, list[Layer]]:
    found: dict[int, list[Layer]] = {}
    for layer in layers:
        if (number := block_number(layer["name"])) is not None:
            found.setdefault(number, []).append(layer)
    return dict(sorted(found.items()))


def early_and_late(model: nn.Module) -> list[dict[str, Any]]:
    """First block, last block and all blocks of a converted model, each pooled."""
    layers = [measure(weight) for weight in master_weights(model)]
    used = next((one["pattern"] for one in reversed(layers) if one["pattern"] != "dense"), "dense")
    blocks = list(_blocks(layers).values())
    ends = {"early": blocks[0], "late": blocks[-1]} if blocks else {}
    return [
        {"position": position, "pattern": used, **rounded(pool(parts))}
        for position, parts in (ends | {"all": layers}).items()
    ]


@dataclass(frozen=True)
class Analysis:
    """What was measured; its text is a table."""

    # What polarization.json holds: checkpoint, kind, overall, layers, and left_out (name → reason,
    # for modules that training leaves as they are).
    values: dict[str, Any]

    def __str__(self) -> str:
        layers = self.values["layers"]
        width = max(6, *(len(layer["name"]) for layer in layers))
        lines = [f"{'matrix':{width}}  {'shape':>14}  pattern  zeros  lose nothing  kurtosis"]
        for layer in [*layers, self.values["overall"]]:
            name, shape = layer.get("name", "all"), "×".join(map(str, layer.get("shape", ())))
            lines.append(
                f"{name:{width}}  {shape:>14}  {layer.get('pattern', ''):7}  "
                f"{layer['zeros_before_mask']:5.1%}  {layer['dead_zone_groups']:12.1%}  "
                f"{layer['kurtosis']:8.2f}"
            )
        lines += [f"left out: {name}: {why}" for name, why in self.values["left_out"].items()]
        return "\n".join(lines)


def analyse(
    checkpoint: str | Path, out: str | Path | None = None, *, pattern: str | None = None
) -> Analysis:
    """Measure every linear of a model; its directory stays as it is.

    Args:
        checkpoint: a training run, its model/, a Hugging Face directory, or a GGUF file.
        out: a directory that receives polarization.json, with the histograms, and PNGs of them.
        pattern: whose pruning thresholds to take; by default those it was trained with, else 6:8.

    Returns:
        What :class:`sparse_bitnet.core.Polarization` holds, of every matrix and of all.

    Raises:
        CheckpointError: if there are no readable master weights.
        ConfigError: if training would convert none of them.
        PatternError: if the pattern does not fit a weight.
        MissingExtraError: without matplotlib, where ``out`` is given.
    """
    directory = Path(checkpoint)
    directory = directory / "model" if (directory / "model").is_dir() else directory
    model, kind, conversion = _converted(directory, pattern)
    layers, weights = [], list(master_weights(model))
    with progress("polarization", len(weights)) as task:
        for weight in weights:
            layers.append(measure(weight))
            task.advance(detail=weight.name)
    result = {
        "checkpoint": str(checkpoint),
        "kind": kind or "unknown",
        "overall": rounded(pool(layers)),
        "layers": [rounded(layer) for layer in layers],
        "left_out": conversion.skipped,
    }
    if out is None:
        say("--out DIRECTORY takes histograms and figures")
        return Analysis(result)
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "polarization.json", json.dumps(result, indent=1) + "\n")
    for name, png in _pictures(layers, kind).items():
        (target / name).write_bytes(png)
    say(f"{len(layers)} matrices; histograms and figures are in {target}")
    return Analysis(result)


def _converted(directory: Path, pattern: str | None) -> tuple[nn.Module, str, Conversion]:
    """The model with its linears converted as in training, if it was trained; and its kind."""
    if is_gguf(directory):
        model, _ = read_gguf(directory)
        return model, "", convert(model, pattern or PROBE)
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist")
    if not directory.is_dir() or is_packed(directory):
        raise CheckpointError(
            f"{directory} has no master weights; give a training run or a Hugging Face directory "
            "of safetensors (of a packed model, the one that it was packed from)"
        )
    if not is_trained(directory):
        model = read_dense(directory)
        return model, "", convert(model, pattern or PROBE)
    trained = read_trained(directory)
    model = read_dense(directory, exact=True, use_safetensors=True)
    if pattern:  # also where a rule had another
        rules = {rule: value for rule, value in trained.rules.items() if value == "skip"}
        trained = dataclasses.replace(trained, pattern=pattern, rules=rules)
    return model, trained.kind, convert_model(model, trained)


def _pictures(layers: Sequence[Layer], kind: str) -> dict[str, bytes]:
    """``polarization.png``: first block, last block, all. ``layers.png``: figures by block."""
    from sparse_bitnet.study import plots  # needs matplotlib, which a sweep does not

    blocks = {number: pool(parts) for number, parts in _blocks(layers).items()}
    shown = {"all linears": pool(layers)}
    if blocks:
        early, late = min(blocks), max(blocks)
        ends = {f"early: block {early}": blocks[early], f"late: block {late}": blocks[late]}
        shown = ends | shown
    histograms = [plots.Histogram(title, one, kind) for title, one in shown.items()]
    pictures = {"polarization.png": plots.polarization([histograms], "Weights in units of γ")}
    if len(blocks) > 1:
        curves = [
            plots.Curve(label, list(blocks), [one[name] for one in blocks.values()])
            for name, label in FRACTIONS.items()
        ]
        pictures["layers.png"] = plots.lines(
            curves, "Polarization by block", "decoder block", "fraction"
        )
    return pictures
