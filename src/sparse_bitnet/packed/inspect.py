"""Contents of a model directory, measured from its weights instead of its config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from torch import Tensor, nn

from sparse_bitnet.console import progress
from sparse_bitnet.core import Pattern, method_mask, worst_group, zero_matrices
from sparse_bitnet.nn import DerivedModule, convert
from sparse_bitnet.nn.int8_head import TiedInt8Head
from sparse_bitnet.nn.pack import derived_ternary
from sparse_bitnet.nn.packed_module import PackedModule
from sparse_bitnet.packed.load import load_unfused
from sparse_bitnet.packed.sizes import least_bits, readable_bytes
from sparse_bitnet.packed.write import distinct_tensors

Kind = Literal["packed", "trained", "trained bf16", "ordinary"]
GROUP_WITHOUT_PATTERN = 8  # where a dense module is looked at for N of M


@dataclass(frozen=True)
class WeightReport:
    """One weight matrix (or one of each expert)."""

    name: str  # of the weight in the model
    shape: tuple[int, ...]  # ``[..., out, in]``
    declared: str  # the pattern it is meant to keep
    met: str  # the sparsest N:M that it does keep, with the declared M (8 if dense)
    zeros: float  # fraction of weights that are zero
    bits: float  # that a weight takes in the files, scales included
    zero_matrices: list[str]  # which of its logical matrices are all zero, by name

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class DirectoryReport:
    """A model directory."""

    directory: str  # what was inspected
    # ``packed``; ``trained`` for master weights with ternary linears, ``trained bf16`` for the BF16
    # baseline; ``ordinary`` for any other model, whose linears are the weights that ``convert``
    # would take
    kind: Kind
    architecture: str  # the model's class
    storage: str | None  # format of a packed directory's bytes
    activation_bits: list[int]  # those in use; none in full precision
    weights: list[WeightReport]  # one report a weight
    file_bytes: int  # what the weight files take
    other_parameters: int  # in embeddings, norms, head and biases; tied ones once
    other_bytes: int  # what they take in the files
    head: str  # the dtype of the output head, or how it is stored

    @property
    def count(self) -> int:
        return sum(report.count for report in self.weights)

    @property
    def zeros(self) -> float:
        return sum(report.zeros * report.count for report in self.weights) / self.count

    @property
    def bits(self) -> float:
        """Bits a weight in the files."""
        return sum(report.bits * report.count for report in self.weights) / self.count

    @property
    def least_bits(self) -> float:
        """Bits a weight that any lossless code of ternary weights with these patterns needs."""
        least = (least_bits(Pattern.parse(report.met)) * report.count for report in self.weights)
        return sum(least) / self.count

    @property
    def float32_bytes(self) -> int:
        return 4 * (self.count + self.other_parameters)

    def as_dict(self) -> dict[str, object]:
        """For JSON: the attributes and the totals."""
        totals = ("count", "zeros", "bits", "least_bits", "float32_bytes")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in totals}

    def table(self) -> Table:
        """One row a weight."""
        table = Table("weight", "shape", "pattern", "met", "zeros", "bits", box=None)
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for report in self.weights:
            table.add_row(
                report.name,
                "×".join(map(str, report.shape)),
                report.declared,
                report.met,
                f"{report.zeros:.1%}",
                f"{report.bits:.2f}",
            )
        return table

    def summary(self) -> str:
        """The totals in lines for people."""
        how = f"{self.kind}, {self.storage}" if self.storage else self.kind
        lines = [
            f"{self.directory}: {self.architecture}, {how}",
            f"weights     {self.count:,} in {len(self.weights)} matrices, {self.zeros:.1%} zero, "
            f"{self.bits:.2f} bits each in the files",
            f"the rest    {self.other_parameters:,} parameters, "
            f"{readable_bytes(self.other_bytes)}; the head is {self.head}",
            f"files       {readable_bytes(self.file_bytes)}; in float32 the model takes "
            f"{readable_bytes(self.float32_bytes)}",
        ]
        zero = [name for report in self.weights for name in report.zero_matrices]
        if zero:
            more = ", …" if len(zero) > 4 else ""
            lines.append(f"all zero    {len(zero)} matrices: {', '.join(zero[:4])}{more}")
        if self.activation_bits:
            activations = " and ".join(f"int{bits}" for bits in self.activation_bits)
            lines.insert(
                2,
                f"activations {activations}; any lossless code for the patterns met needs "
                f"{self.least_bits:.3f} bits a weight",
            )
        return "\n".join(lines)


def inspect(directory: str | Path) -> DirectoryReport:
    """Measure a model directory. A packed one's checksums are verified on the way.

    Raises:
        PackedFormatError: if a packed directory is damaged, or breaks its own pattern.
        CheckpointError: if another one is damaged, or there is no model.
        ConfigError: if it is an ordinary model without linears to convert.
    """
    directory = Path(directory)
    model, _ = load_unfused(directory, device="cpu")
    files = [directory]
    if directory.is_dir():  # pickled weights are read where there are no others
        files = [*directory.glob("*.safetensors")] or [*directory.glob("pytorch_model*.bin")]
    stored_bytes: float = model.dtype.itemsize
    if directory.is_file():  # GGUF: the mean over all types in it
        stored_bytes = directory.stat().st_size / sum(p.numel() for p in model.parameters())
    modules = _modules(model)
    ordinary = not modules
    if ordinary:
        convert(model, "dense", kind="bf16")
        modules = _modules(model)
    weights: list[WeightReport] = []
    inside: set[str] = set()
    with progress("inspecting", len(modules)) as task:
        for name, module in modules.items():
            weights += _reports(name, module, stored_bytes if ordinary else None)
            inside |= {f"{name}.{key}" for key in module.state_dict() if key != "bias"}
            task.advance()
    others = {n: tensor for n, tensor in distinct_tensors(model).items() if n not in inside}
    packed = [module for module in modules.values() if isinstance(module, PackedModule)]
    ternary = all(isinstance(m, PackedModule) or m.is_ternary for m in modules.values())
    bits = {
        m.spec.activation_bits if isinstance(m, PackedModule) else m.method.activation_bits
        for m in modules.values()
    }
    kind: Kind = "packed" if packed else "trained" if ternary else "trained bf16"
    return DirectoryReport(
        directory=str(directory),
        kind="ordinary" if ordinary else kind,
        architecture=type(model).__name__,
        storage=packed[0].spec.storage if packed else None,
        activation_bits=sorted(bits) if ternary else [],
        weights=weights,
        file_bytes=sum(file.stat().st_size for file in files),
        other_parameters=sum(t.numel() for n, t in others.items() if not n.endswith("_scale")),
        other_bytes=sum(tensor.nbytes for tensor in others.values()),
        head=_head(model),
    )


def _modules(model: nn.Module) -> dict[str, PackedModule | DerivedModule]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedModule | DerivedModule)}


def _head(model: Any) -> str:
    head = model.get_output_embeddings()
    tied = isinstance(head, TiedInt8Head) or head.weight is model.get_input_embeddings().weight
    dtype = str(head.weight.dtype).removeprefix("torch.")
    return f"{dtype}, shared with the embedding" if tied else dtype


def _reports(
    name: str, module: PackedModule | DerivedModule, stored_bytes: float | None
) -> Iterator[WeightReport]:
    if isinstance(module, PackedModule):
        declared, state = module.spec.pattern, module.state_dict()
        for key, shape in module.weight_shapes.items():
            stored = state[key].nbytes + state[f"{key}_scale"].nbytes
            sizes = module.shard_sizes_of(key)
            bits = 8 * stored / math.prod(shape)
            yield _report(f"{name}.{key}", module.unpack(key), declared, bits, sizes)
        return
    ternary = derived_ternary(module)
    for key, weight in module.master_parameters().items():
        sizes, bits = module.shard_sizes_of(key), 8 * (stored_bytes or weight.element_size())
        values = ternary[key][0] if ternary else weight.detach()
        if not ternary:
            mask = method_mask(weight, module.pattern, module.method, sizes)
            values = values if mask is None else values * mask
        yield _report(f"{name}.{key}", values, module.pattern, bits, sizes)


def _report(
    name: str, values: Tensor, declared: Pattern, bits: float, shard_sizes: tuple[int, ...]
) -> WeightReport:
    m = GROUP_WITHOUT_PATTERN if declared.is_dense else declared.m
    met = "dense"
    if values.shape[-1] % m == 0:
        met = str(Pattern(max(1, worst_group(values, m)), m))
    zeros = 1 - int(values.count_nonzero()) / values.numel()
    zero = [name + index for index in zero_matrices(values, shard_sizes)]
    return WeightReport(name, tuple(values.shape), str(declared), met, zeros, bits, zero)
