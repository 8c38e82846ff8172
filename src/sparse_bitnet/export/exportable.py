"""Input of every export: the ternary layers of a packed or trained directory, one at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.core import ConfigError, check_finite, row_scale
from sparse_bitnet.nn import SparseBitLinear, converted_modules
from sparse_bitnet.nn.int8_head import Int8Table
from sparse_bitnet.nn.pack import pack_module, packed_spec
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.packed_module import PackedModule, PackedSpec
from sparse_bitnet.packed.load import load_unfused
from sparse_bitnet.packed.sizes import readable_bytes
from sparse_bitnet.packed.write import distinct_tensors


@dataclass(frozen=True)
class TernaryLinear:
    """One layer: ``W = γ · ternary``.

    Attributes:
        ternary: int8 ``[out, in]``.
        scale: float32 ``[shards]``, γ of each matrix fused into the rows.
        shard_sizes: rows of each of them; empty for one matrix.
        bias: ``[out]``, or None.
    """

    ternary: Tensor
    scale: Tensor
    shard_sizes: tuple[int, ...]
    bias: Tensor | None

    @property
    def row_scale(self) -> Tensor:
        """γ of every row, float32 ``[out]``."""
        return row_scale(self.scale, self.shard_sizes, self.ternary.shape[0])


@dataclass(frozen=True)
class Exportable:
    """A model whose ternary layers can be read one after the other.

    Attributes:
        model: as loaded, on the CPU.
        tokenizer: None if the directory has none.
        shapes: ``(out, in)`` of each ternary layer, by name.
        biases: names of those that have a bias.
        linear: reads one of them.
        others: all tensors outside of ternary layers, tied ones once.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    shapes: dict[str, tuple[int, int]]
    biases: set[str]
    linear: Callable[[str], TernaryLinear]
    others: dict[str, Tensor]

    @property
    def weights(self) -> int:
        """How many weights are ternary."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def open_exportable(directory: str | Path, target: str) -> Exportable:
    """Open a packed or trained directory; a trained one's layers are packed as they are read.

    Args:
        directory: of the model.
        target: what it will become, for error messages.

    Raises:
        PackedFormatError, CheckpointError: if the directory is damaged or none of ours.
        ConfigError: if a layer is not ternary, belongs to experts, or was trained with four-bit
            activations, which the formats of others cannot say.
        WeightError: if a tensor holds NaN or infinity.
    """
    model, tokenizer = load_unfused(directory, device="cpu")
    modules: dict[str, nn.Module] = dict(converted_modules(model))
    modules |= {n: m for n, m in model.named_modules() if isinstance(m, PackedModule)}
    if not modules:
        raise ConfigError(
            f"{directory}: nothing in it is ternary; {target} takes a packed or a trained model"
        )
    shapes = {name: _shape(name, module, target) for name, module in modules.items()}

    def linear(name: str) -> TernaryLinear:
        module = modules[name]
        if isinstance(module, SparseBitLinear):
            module = pack_module(module, "two-bit", name)
        assert isinstance(module, PackedLinear)
        scale = module.get_buffer("weight_scale")
        return TernaryLinear(module.unpack("weight"), scale, module.spec.shard_sizes, module.bias)

    inside = tuple(f"{name}." for name in modules)
    others = {n: t for n, t in distinct_tensors(model).items() if not n.startswith(inside)}
    for name, module in model.named_modules():
        if isinstance(module, Int8Table):
            del others[f"{name}.weight_scale"]
            others[f"{name}.weight"] = module.dequantize()
    biases = {n: m.bias for n, m in modules.items() if isinstance(m.bias, Tensor)}
    for name, tensor in (others | {f"{n}.bias": bias for n, bias in biases.items()}).items():
        if tensor.is_floating_point():
            check_finite(tensor, name)
    return Exportable(model, tokenizer, shapes, set(biases), linear, others)


def _shape(name: str, module: nn.Module, target: str) -> tuple[int, int]:
    """``(out, in)`` of a layer that can be exported."""
    if not isinstance(module, PackedLinear | SparseBitLinear):
        raise ConfigError(
            f"{name}: a {type(module).__name__} has no place in {target}, which takes ternary "
            "linear layers only"
        )
    spec = _spec(name, module)
    if spec.activation_bits != 8:
        raise ConfigError(
            f"{name}: the model was trained with {spec.activation_bits}-bit activations and every "
            f"reader of {target} takes 8 bits, which gives another model's output; pack it and run "
            "it with sparse-bitnet"
        )
    return module.out_features, module.in_features


def _spec(name: str, module: PackedLinear | SparseBitLinear) -> PackedSpec:
    if isinstance(module, PackedLinear):
        return module.spec
    return packed_spec(module, "two-bit", name)


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote. ``str()`` reports it, and what the format loses.

    Attributes:
        path: the file or directory.
        format: its name.
        weights: how many ternary weights it holds.
        bytes: of everything in it.
        lost: what its readers compute otherwise than this package, one line each.
        types: of each tensor of the file, by its name there; empty where a format has one.
    """

    path: Path
    format: str
    weights: int
    bytes: int
    lost: list[str]
    types: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.path}: {self.format}, {self.weights:,} ternary weights, "
        lines = [head + readable_bytes(self.bytes), *(f"  · {line}" for line in self.lost)]
        for kind in dict.fromkeys(self.types.values()):
            # The same tensor of every block counts as one name.
            names = [re.sub(r"\.\d+\.", ".*.", n) for n, its in self.types.items() if its == kind]
            counts = (f"{name} ({names.count(name)})" for name in dict.fromkeys(names))
            lines.append(f"  {kind}: {', '.join(counts)}")
        return "\n".join(lines)
