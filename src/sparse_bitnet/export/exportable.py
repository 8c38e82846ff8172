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
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.packed_module import PackedModule
from sparse_bitnet.packed.load import load_unfused
from sparse_bitnet.packed.sizes import readable_bytes
from sparse_bitnet.packed.write import distinct_tensors


@dataclass(frozen=True)
class Exportable:
    """A model whose ternary layers can be read one after the other."""

    model: PreTrainedModel  # as loaded, on the CPU
    tokenizer: PreTrainedTokenizerBase | None  # None if the directory has none
    shapes: dict[str, tuple[int, int]]  # ``(out, in)`` of each ternary layer, by name
    # reads the weight ``W = γ · T`` of one of them: T as int8 ``[out, in]``, and γ of every row as
    # float32 ``[out]``
    linear: Callable[[str], tuple[Tensor, Tensor]]
    others: dict[str, Tensor]  # all tensors but these weights, tied ones once

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
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in modules.items():
        if not isinstance(module, PackedLinear | SparseBitLinear):
            raise ConfigError(
                f"{name}: a {type(module).__name__} has no place in {target}, which takes ternary "
                "linear layers only"
            )
        how = module.spec if isinstance(module, PackedLinear) else module.method
        bits = how.activation_bits
        if bits != 8:
            raise ConfigError(
                f"{name}: the model was trained with {bits}-bit activations and every reader of "
                f"{target} takes 8 bits, which gives another model's output; pack it and run it "
                "with sparse-bitnet"
            )
        shapes[name] = module.out_features, module.in_features

    def linear(name: str) -> tuple[Tensor, Tensor]:
        module = modules[name]
        if isinstance(module, SparseBitLinear):
            module = pack_module(module, "two-bit", name)
        assert isinstance(module, PackedLinear)
        scale, sizes = module.get_buffer("weight_scale"), module.spec.shard_sizes
        rows = row_scale(scale, sizes, module.out_features)
        return module.unpack("weight"), rows

    inside = tuple(f"{name}.weight" for name in modules)
    others = {n: t for n, t in distinct_tensors(model).items() if not n.startswith(inside)}
    for name, module in model.named_modules():
        if isinstance(module, Int8Table):
            del others[f"{name}.weight_scale"]
            others[f"{name}.weight"] = module.dequantize()
    for name, tensor in others.items():
        if tensor.is_floating_point():
            check_finite(tensor, name)
    return Exportable(model, tokenizer, shapes, linear, others)


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote. ``str()`` reports it, and what the format loses."""

    path: Path  # the file or directory
    format: str  # its name
    weights: int  # how many ternary weights it holds
    bytes: int  # of everything in it
    lost: list[str]  # what its readers compute otherwise than this package, one line each
    # of each tensor of the file, by its name there; empty where a format has one
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
