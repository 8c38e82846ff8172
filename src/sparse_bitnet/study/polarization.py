"""How far the weights of a model have polarized, layer by layer.

Works on whatever holds master weights: a training run, its ``model/``, a Hugging Face directory, a
GGUF file.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_bitnet.console import progress, say
from sparse_bitnet.core import CheckpointError, Pattern, Polarization, polarization
from sparse_bitnet.files import write_text
from sparse_bitnet.nn import Conversion, MasterWeight, convert, master_weights
from sparse_bitnet.packed.load import is_packed
from sparse_bitnet.study import plots
from sparse_bitnet.train.dense import is_gguf, read_dense, read_gguf
from sparse_bitnet.train.export import is_trained, read_trained

# A dense model is measured with the pattern that it could be masked to.
PROBE = Pattern(6, 8)
DIGITS = 5
# Of a plot or a table: what they show beside the histograms.
FRACTIONS = {"zeros_before_mask": "zeros before the mask", "dead_zone_groups": "lose nothing"}


@dataclass(frozen=True)
class LayerStatistics:
    """One weight matrix: name, shape, rows of the matrices fused into it (empty for one), the
    pattern of the thresholds, and what was found."""

    name: str
    shape: tuple[int, ...]
    shard_sizes: tuple[int, ...]
    pattern: str
    statistics: Polarization

    @property
    def block(self) -> int | None:
        """Index of its decoder block; None outside the blocks."""
        return block_number(self.name)

    def to_dict(self) -> dict[str, Any]:
        values = {"name": self.name, "shape": list(self.shape), "pattern": self.pattern}
        return {**values, "shard_sizes": list(self.shard_sizes), **as_dict(self.statistics)}


def as_dict(statistics: Polarization) -> dict[str, Any]:
    """Plain values, rounded to what a plot can show."""
    return {
        name: [round(v, DIGITS) for v in value] if isinstance(value, list) else round(value, DIGITS)
        for name, value in dataclasses.asdict(statistics).items()
    }


def pool(layers: Sequence[LayerStatistics]) -> Polarization:
    """Statistics of several matrices together, each by its number of weights.

    Histograms are exact (each matrix counts in units of its own γ); kurtosis is the mean over the
    matrices.
    """
    sizes = [torch.Size(layer.shape).numel() for layer in layers]

    def mean(values: Iterable[float]) -> float:
        return sum(v * size for v, size in zip(values, sizes, strict=True)) / sum(sizes)

    def pooled(name: str) -> Any:
        values = [getattr(layer.statistics, name) for layer in layers]
        if isinstance(values[0], list):
            return [mean(column) for column in zip(*values, strict=True)]
        return mean(values)

    names = [field.name for field in dataclasses.fields(Polarization) if field.name != "edges"]
    return Polarization(edges=layers[0].statistics.edges, **{name: pooled(name) for name in names})


def block_number(name: str) -> int | None:
    """Index of the decoder block in a parameter's name; None outside the blocks."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.", name)
    return int(found[1]) if found else None


@torch.no_grad()
def _measure(weight: MasterWeight) -> LayerStatistics:
    """Dense weights get the thresholds of 6:8, where 8 divides their rows, to be compared by."""
    pattern, shape = weight.pattern, tuple(weight.weight.shape)
    if pattern.is_dense and shape[-1] % PROBE.m == 0:
        pattern = PROBE
    found = polarization(weight.weight, pattern, weight.shard_sizes)
    return LayerStatistics(weight.name, shape, weight.shard_sizes, str(pattern), found)


def _early_and_late(layers: Sequence[LayerStatistics]) -> dict[str, list[LayerStatistics]]:
    """First block, last block, and all."""
    numbers = [layer.block for layer in layers if layer.block is not None]
    ends = {"early": min(numbers), "late": max(numbers)} if numbers else {}
    found = {name: [one for one in layers if one.block == end] for name, end in ends.items()}
    return {**found, "all": list(layers)}


def early_and_late(model: nn.Module) -> list[dict[str, Any]]:
    """First block, last block and all blocks of a converted model, each pooled."""
    layers = [_measure(weight) for weight in master_weights(model)]
    used = next((one.pattern for one in reversed(layers) if one.pattern != "dense"), "dense")
    return [
        {"position": position, "pattern": used, **as_dict(pool(parts))}
        for position, parts in _early_and_late(layers).items()
        if parts
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
    """Measure every linear of a model; write JSON and plots.

    Args:
        checkpoint: a training run, its model/, a Hugging Face directory, or a GGUF file.
        out: receives polarization.json and PNGs; by default polarization/ in the model's directory.
        pattern: whose pruning thresholds to take; by default those it was trained with, else 6:8.

    Returns:
        For every matrix: zeros before any mask, groups of which masking takes nothing but such
        zeros, kurtosis; with histograms of |w|/γ and of the thresholds, γ as in training.

    Raises:
        CheckpointError: if there are no readable master weights.
        ConfigError: if training would convert none of them.
        PatternError: if the pattern does not fit a weight.
        MissingExtraError: without matplotlib.
    """
    directory = Path(checkpoint)
    directory = directory / "model" if (directory / "model").is_dir() else directory
    model, kind, conversion = _converted(directory, pattern)
    layers = []
    weights = list(master_weights(model))
    with progress("polarization", len(weights)) as task:
        for weight in weights:
            layers.append(_measure(weight))
            task.advance(detail=weight.name)
    overall = pool(layers)
    result = {
        "checkpoint": str(checkpoint),
        "kind": kind or "unknown",
        "overall": as_dict(overall),
        "layers": [layer.to_dict() for layer in layers],
        "left_out": conversion.skipped,
    }
    beside = directory if directory.is_dir() else directory.parent
    target = Path(out) if out is not None else beside / "polarization"
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "polarization.json", json.dumps(result, indent=1) + "\n")
    for name, png in _pictures(layers, kind).items():
        (target / name).write_bytes(png)
    patterns = sorted({layer.pattern for layer in layers})
    say(
        f"{len(layers)} matrices: {overall.zeros_before_mask:.1%} zeros before the mask, "
        f"{overall.dead_zone_groups:.1%} of {' and '.join(patterns)} groups lose nothing, "
        f"kurtosis {overall.kurtosis:.2f}; written to {target}"
    )
    return Analysis(result)


def _converted(directory: Path, pattern: str | None) -> tuple[nn.Module, str, Conversion]:
    """The model with its linears converted as in training, if it was trained; and its kind."""
    if is_gguf(directory):
        model, _ = read_gguf(directory)
        return model, "", convert(model, pattern or PROBE)
    if not directory.is_dir() or is_packed(directory):
        raise CheckpointError(
            f"{directory} has no master weights; give a training run or a Hugging Face directory "
            "of safetensors (of a packed model, the one that it was packed from)"
        )
    if not is_trained(directory):
        model = read_dense(directory)
        return model, "", convert(model, pattern or PROBE)
    trained = read_trained(directory)
    model, rules = read_dense(directory, exact=True, use_safetensors=True), trained.rules
    if pattern:  # also where a rule had another
        rules = {rule: value for rule, value in rules.items() if value == "skip"}
    wanted = pattern or trained.pattern
    report = convert(model, wanted, kind=trained.kind, method=trained.method, rules=rules)
    return model, trained.kind, report


def _pictures(layers: Sequence[LayerStatistics], kind: str) -> dict[str, bytes]:
    """``polarization.png``: first block, last block, all. ``layers.png``: figures by block."""
    blocks = {
        number: [layer for layer in layers if layer.block == number]
        for number in sorted({one.block for one in layers if one.block is not None})
    }
    shown = [
        plots.Histogram(
            f"{name}: block {parts[0].block}" if name != "all" else "all linears",
            one.edges,
            one.magnitudes,
            one.thresholds,
            kind,
        )
        for name, parts in _early_and_late(layers).items()
        for one in [pool(parts)]
    ]
    pictures = {"polarization.png": plots.polarization([shown], "Weights in units of γ")}
    if len(blocks) > 1:
        pooled = {number: pool(parts) for number, parts in blocks.items()}
        curves = [
            plots.Curve(label, list(pooled), [getattr(p, name) for p in pooled.values()])
            for name, label in FRACTIONS.items()
        ]
        pictures["layers.png"] = plots.lines(
            curves, "Polarization by block", "decoder block", "fraction"
        )
    return pictures
