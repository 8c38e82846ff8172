"""How far the weights of a checkpoint have polarized, layer by layer.

Works on whatever holds master weights: the directory of a training run, one of its checkpoints, any
Hugging Face directory of safetensors, a single safetensors file, or a GGUF file. Tensors are read
one at a time (but of GGUF), nothing is unpickled, and of the model only its shapes are built: they
tell what training would take for a linear layer, and where one matrix holds several.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_bitnet.console import progress, say
from sparse_bitnet.core import (
    CheckpointError,
    Pattern,
    Polarization,
    check_finite,
    polarization,
)
from sparse_bitnet.files import write_text
from sparse_bitnet.nn import master_weights
from sparse_bitnet.study import plots
from sparse_bitnet.study.weights import (
    PACKED,
    Architecture,
    linear_weights,
    model_directory,
    read_architecture,
    trained_as,
)
from sparse_bitnet.train.dense import is_gguf

# A dense model is measured with the pattern that it could be masked to.
PROBE = Pattern(6, 8)
DIGITS = 5


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
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "shard_sizes": list(self.shard_sizes),
            "pattern": self.pattern,
            **as_dict(self.statistics),
        }


def as_dict(statistics: Polarization) -> dict[str, Any]:
    """Plain values, rounded to what a plot can show."""
    return {
        name: [round(v, DIGITS) for v in value] if isinstance(value, list) else round(value, DIGITS)
        for name, value in dataclasses.asdict(statistics).items()
    }


def pool(parts: Sequence[tuple[Polarization, int]]) -> Polarization:
    """Statistics of several matrices together, each by its number of weights.

    Histograms are exact (each matrix counts in units of its own γ); kurtosis is the mean over the
    matrices.
    """
    total = sum(size for _, size in parts)

    def mean(values: Iterable[float]) -> float:
        pairs = zip(values, parts, strict=True)
        return sum(value * size for value, (_, size) in pairs) / total

    def bins(name: str) -> list[float]:
        return [mean(column) for column in zip(*(getattr(p, name) for p, _ in parts), strict=True)]

    return Polarization(
        edges=parts[0][0].edges,
        magnitudes=bins("magnitudes"),
        thresholds=bins("thresholds"),
        zeros_before_mask=mean(p.zeros_before_mask for p, _ in parts),
        dead_zone_groups=mean(p.dead_zone_groups for p, _ in parts),
        kurtosis=mean(p.kurtosis for p, _ in parts),
    )


def block_number(name: str) -> int | None:
    """Index of the decoder block in a parameter's name; None outside the blocks."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.", name)
    return int(found[1]) if found else None


@torch.no_grad()
def early_and_late(model: nn.Module) -> list[dict[str, Any]]:
    """First block, last block and all blocks of a converted model, each pooled.

    Dense weights get the thresholds of 6:8 where 8 divides their rows, to be compared by.
    """
    found: dict[str, list[tuple[Polarization, int]]] = {"early": [], "late": [], "all": []}
    weights = list(master_weights(model))
    numbers = [n for n in (block_number(w.name) for w in weights) if n is not None]
    used = "dense"
    for weight in weights:
        pattern = _probe(weight.pattern, weight.weight.shape[-1])
        used = used if pattern.is_dense else str(pattern)
        one = polarization(weight.weight, pattern, weight.shard_sizes), weight.weight.numel()
        number = block_number(weight.name)
        found["all"].append(one)
        if numbers and number == min(numbers):
            found["early"].append(one)
        if numbers and number == max(numbers):
            found["late"].append(one)
    return [
        {"position": position, "pattern": used, **as_dict(pool(parts))}
        for position, parts in found.items()
        if parts
    ]


@dataclass(frozen=True)
class Analysis:
    """What was measured; its text is a table.

    Attributes:
        values: what ``polarization.json`` holds: ``checkpoint``, ``kind``, ``pattern``,
            ``overall``, ``layers``, ``scales`` (how many γ a matrix has, and why) and ``left_out``
            (name → reason, for matrices that training would leave as they are).
    """

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
        lines.append(f"γ: {self.values['scales']}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.values["left_out"].items():
            reasons.setdefault(reason, []).append(name)
        lines += [
            f"left out: {len(names)} matrices, {names[0]} for example: {reason}"
            for reason, names in reasons.items()
        ]
        return "\n".join(lines)


def analyse(
    checkpoint: str | Path, out: str | Path | None = None, *, pattern: str | None = None
) -> Analysis:
    """The verb ``polarization``: measure every linear of a checkpoint, write JSON and plots.

    Args:
        checkpoint: a training run, one of its checkpoints, a Hugging Face directory, or a
            safetensors or GGUF file.
        out: receives ``polarization.json`` and the PNGs; by default ``polarization/`` in the
            checkpoint's directory.
        pattern: whose pruning thresholds to take; by default the one that the checkpoint was
            trained with (matrix by matrix, where it had rules), else 6:8.

    Returns:
        For every matrix: zeros before any mask, groups of which masking takes nothing but such
        zeros, kurtosis; with histograms of |w|/γ and of the thresholds. γ is that of training, one
        for each of the matrices fused into one, if the configuration can be read.

    Raises:
        CheckpointError: if there are no readable master weights.
        PatternError: if the pattern does not fit a weight.
        WeightError: if a weight holds NaN or infinity.
        MissingExtraError: without matplotlib.
    """
    directory = model_directory(Path(checkpoint))
    beside = directory if directory.is_dir() else directory.parent
    trained, source = trained_as(directory)
    kind = trained.kind if trained else ""
    chosen = Pattern.parse(pattern or (trained.pattern if trained else "6:8"))
    described = directory if is_gguf(directory) else beside
    architecture = read_architecture(source or str(described.resolve()))  # no name of a preset
    found = _measure(
        directory, architecture, chosen, trained.rules if trained else {}, own=not pattern
    )
    layers, left = found.layers, found.left
    if not layers:
        why = next((f"{name} is left out: {reason}" for name, reason in left.items()), PACKED)
        raise CheckpointError(
            f"{directory} holds no floating-point matrix of a linear layer; {why}"
        )
    scales = architecture.scales
    if architecture.parameters and found.unknown:
        scales += f"; one each for {found.unknown} matrices that the model holds otherwise"
    overall = pool([(layer.statistics, layer.size) for layer in layers])
    result = {
        "checkpoint": str(checkpoint),
        "kind": kind or "unknown",
        "pattern": str(_probe(chosen, 0)),
        "overall": as_dict(overall),
        "layers": [layer.to_dict() for layer in layers],
        "scales": scales,
        "left_out": left,
    }
    target = Path(out) if out is not None else beside / "polarization"
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "polarization.json", json.dumps(result, indent=1) + "\n")
    for name, png in _pictures(layers, overall, kind).items():
        (target / name).write_bytes(png)
    patterns = sorted({layer.pattern for layer in layers})
    say(
        f"{len(layers)} matrices: {overall.zeros_before_mask:.1%} zeros before the mask, "
        f"{overall.dead_zone_groups:.1%} of {' and '.join(patterns)} groups lose nothing, "
        f"kurtosis {overall.kurtosis:.2f}; written to {target}"
    )
    return Analysis(result)


@dataclass
class _Found:
    """Layers in their order, matrices left out (name → reason), and how many others there are."""

    layers: list[LayerStatistics]
    left: dict[str, str]
    unknown: int = 0


def _measure(
    directory: Path,
    architecture: Architecture,
    pattern: Pattern,
    rules: Mapping[str, str],
    own: bool,
) -> _Found:
    """All linears that training did not skip; ``own``: with the patterns that rules gave them."""
    found = _Found([], {})
    with progress("polarization") as task, torch.no_grad():
        for name, weight, parameter in linear_weights(directory, architecture):
            module = name.rpartition(".")[0]
            choice = next((value for rule, value in rules.items() if re.search(rule, module)), None)
            if choice == "skip":
                continue
            if parameter and parameter.left_out:
                found.left[name] = parameter.left_out
                continue
            found.unknown += parameter is None
            shard_sizes = parameter.shard_sizes if parameter else ()
            check_finite(weight, name)
            given = Pattern.parse(choice) if choice and own else pattern
            used = _probe(given, weight.shape[-1])
            used.check_divides(weight.shape[-1], name)
            statistics = polarization(weight, used, shard_sizes)
            found.layers.append(
                LayerStatistics(name, tuple(weight.shape), shard_sizes, str(used), statistics)
            )
            task.advance(detail=name)
    found.layers.sort(key=lambda layer: _natural(layer.name))
    return found


def _probe(pattern: Pattern, in_features: int) -> Pattern:
    """The pattern itself, or for a dense one the 6:8 that it is compared by, where that fits."""
    return PROBE if pattern.is_dense and in_features % PROBE.m == 0 else pattern


def _natural(name: str) -> list[tuple[int, str]]:
    """Order ``layers.10`` behind ``layers.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _pictures(
    layers: Sequence[LayerStatistics], overall: Polarization, kind: str
) -> dict[str, bytes]:
    """``polarization.png``: first block, last block, all. ``layers.png``: figures by block."""

    def histogram(title: str, statistics: Polarization) -> plots.Histogram:
        return plots.Histogram(
            title, statistics.edges, statistics.magnitudes, statistics.thresholds, kind
        )

    blocks: dict[int, list[tuple[Polarization, int]]] = {}
    for layer in layers:
        number = block_number(layer.name)
        if number is not None:
            blocks.setdefault(number, []).append((layer.statistics, layer.size))
    shown = [histogram("all linears", overall)]
    if len(blocks) > 1:
        first, last = min(blocks), max(blocks)
        shown = [
            histogram(f"block {first}", pool(blocks[first])),
            histogram(f"block {last}", pool(blocks[last])),
            *shown,
        ]
    pictures = {"polarization.png": plots.polarization([shown], "Weights in units of γ")}
    if len(blocks) > 1:
        pooled = {number: pool(parts) for number, parts in sorted(blocks.items())}
        curves = [
            plots.Curve(label, list(pooled), [getattr(p, name) for p in pooled.values()])
            for label, name in (
                ("zeros before the mask", "zeros_before_mask"),
                ("groups that lose nothing", "dead_zone_groups"),
            )
        ]
        pictures["layers.png"] = plots.lines(
            curves, "Polarization by block", "decoder block", "fraction"
        )
    return pictures
