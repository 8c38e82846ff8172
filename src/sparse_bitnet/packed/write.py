"""Write a trained model as a packed directory.

A packed directory is an ordinary Hugging Face one whose linear weights are stored in ternary:

    config.json             the model's own, and ``quantization_config`` (config.py)
    model.safetensors       or shards with an index; a checksum a tensor (tensor_file.py)
    hf_plugin.py            for trust_remote_code, where the package is not imported
    generation_config.json, tokenizer files

It does not depend on a device: the layout to compute with is derived when it is used.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.console import progress, say
from sparse_bitnet.core import ConfigError, DataError, check_finite, zero_matrices
from sparse_bitnet.data.tokenizer import load_tokenizer, tokenizer_hash
from sparse_bitnet.files import atomic_directory
from sparse_bitnet.formats import StorageName
from sparse_bitnet.formats import storage as storage_named
from sparse_bitnet.nn import converted_modules
from sparse_bitnet.nn.check import check_packed
from sparse_bitnet.nn.convert import warn_of_zeros
from sparse_bitnet.nn.int8_head import int8_modules, quantize_rows
from sparse_bitnet.nn.pack import empty_packed, pack_module, packed_spec
from sparse_bitnet.nn.wrappers import check_adapters, unwrapped
from sparse_bitnet.packed.config import HINT, SparseBitNetConfig
from sparse_bitnet.packed.load import DType, is_packed
from sparse_bitnet.packed.quantizer import AUTO_MAP, PLUGIN, PLUGIN_FILE
from sparse_bitnet.packed.sizes import readable_bytes
from sparse_bitnet.packed.tensor_file import TensorFileWriter, file_size
from sparse_bitnet.packed.verify import INDEX, WEIGHTS, refuse_foreign
from sparse_bitnet.train.export import load_trained

HeadName = Literal["float", "int8"]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class PackResult:
    """Result of :func:`pack`. ``str()`` gives it in a line.

    Attributes:
        directory: where it is.
        modules, weights: how many were packed.
        packed_bytes: what the packed weights and their scales take.
        other_bytes: what embeddings, norms, head and biases take.
        float32_bytes: what the same model takes in float32.
        zero: matrices that are all zero, which a warning names too.
    """

    directory: Path
    modules: int
    weights: int
    packed_bytes: int
    other_bytes: int
    float32_bytes: int
    zero: list[str]

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return 8 * self.packed_bytes / self.weights

    def __str__(self) -> str:
        size = self.packed_bytes + self.other_bytes
        return (
            f"{self.directory}: {self.modules} modules with {self.weights:,} weights packed at "
            f"{self.bits_per_weight:.2f} bits a weight; {readable_bytes(size)} in all, "
            f"{readable_bytes(self.float32_bytes)} in float32"
        )


def pack(
    source: PreTrainedModel | str | Path,
    out: str | Path,
    *,
    storage: StorageName = "two-bit",
    head: HeadName = "float",
    dtype: DType | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    check: bool = True,
) -> PackResult:
    """Write a trained model as a packed directory that ``from_pretrained`` loads.

    One module after the other is packed and written, so that little more memory is needed than the
    trained model takes.

    Args:
        source: a converted model, also inside DDP or ``torch.compile``, or the directory of a
            trained one.
        out: the directory to write; it appears whole or not at all. A packed directory that is
            there already is replaced, unless it holds files of somebody else.
        storage: ``"two-bit"`` (2 bits a weight, fastest to unpack) or ``"trits"`` (1.6 bits).
        head: ``"int8"`` stores the output head, and an embedding tied to it, as int8 with a scale
            for each row; ``"float"`` leaves them as they are.
        dtype: of embeddings, norms, head and biases; the model's own when left out.
        tokenizer: to store beside it; that of the directory when left out.
        shard_bytes: start another weight file when one grows beyond this.
        check: first run a few tokens through the trained model, and give what each layer gets to
            its packed form, one at a time: all must be called and give equal results.

    Raises:
        CheckpointError: if the source directory is damaged or not a trained model.
        ConfigError: if nothing in the model is ternary, it has adapters, ``out`` is another kind of
            directory or has files of somebody else, the tokenizer cannot be loaded, or the head
            cannot be int8.
        WeightError: if a weight holds NaN, or breaks its N:M pattern; names module and group.
        WeightError: if the packed model would compute something else; names the modules.
    """
    out = Path(out)
    storage_named(storage)
    _check_target(out)
    model, own = load_trained(source) if isinstance(source, str | Path) else (source, None)
    model = unwrapped(model)
    check_adapters(model, "pack")
    tokenizer = own if tokenizer is None else tokenizer
    if isinstance(tokenizer, str | Path):
        tokenizer = _read_tokenizer(tokenizer)
    plan = _Plan(model, storage, head, None if dtype is None else getattr(torch, dtype))
    if check:
        check_packed(model, storage)
    with atomic_directory(out) as directory:
        plan.write_config(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
            _warn_if_replaced(directory, tokenizer)
        plan.write_weights(directory, shard_bytes)
    warn_of_zeros(plan.zero)
    return plan.result(out)


@dataclass(frozen=True)
class PackedSizes:
    """What a packed directory's weights will take; see :func:`packed_sizes`.

    Attributes:
        packed_bytes: of packed weights and their scales.
        other_bytes: of embeddings, norms, head and biases.
        file_bytes: of the weight file, header and all, if it is one.
    """

    packed_bytes: int
    other_bytes: int
    file_bytes: int


def packed_sizes(
    model: PreTrainedModel, storage: StorageName, head: HeadName, dtype: DType
) -> PackedSizes:
    """The sizes that :func:`pack` would give a converted model, which may be on the meta device.

    Raises:
        ConfigError: if nothing in the model is ternary, or the head cannot be int8.
    """
    storage_named(storage)
    plan = _Plan(model, storage, head, getattr(torch, dtype))
    result = plan.result(Path())
    return PackedSizes(
        result.packed_bytes, result.other_bytes, file_size(plan.others | plan.packed)
    )


class _Plan:
    """Plan of the files, made from shapes alone, and how to compute each tensor."""

    def __init__(
        self,
        model: PreTrainedModel,
        storage: StorageName,
        head: HeadName,
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self.modules = model, dict(converted_modules(model))
        self.storage, self.dtype = storage, dtype
        if not self.modules:
            raise ConfigError(
                "pack: the model has no ternary modules; convert and train it first (a packed "
                "model cannot be packed again)"
            )
        self.specs = {
            name: packed_spec(module, storage, name) for name, module in self.modules.items()
        }
        self.zero: list[str] = []
        self.packed: Layout = {}
        self.others: Layout = {HINT: (torch.uint8, (0,))}
        for name, module in self.modules.items():
            empty = empty_packed(module, self.specs[name], name)
            for key, tensor in empty.state_dict().items():
                part = self.others if key == "bias" else self.packed
                part[f"{name}.{key}"] = (self._stored_dtype(tensor, key), tuple(tensor.shape))
        inside = tuple(f"{name}." for name in self.modules)
        self.dense = {
            name: tensor
            for name, tensor in distinct_tensors(model).items()
            if not name.startswith(inside)
        }
        self.int8 = int8_modules(model) if head == "int8" else []
        # A tied head is among the names and has no tensor of its own.
        tables = [self.dense.pop(f"{name}.weight", None) for name in self.int8]
        self.tables = {n: t for n, t in zip(self.int8, tables, strict=True) if t is not None}
        for name, tensor in self.dense.items():
            self.others[name] = (self._stored_dtype(tensor), tuple(tensor.shape))
        for name, tensor in self.tables.items():
            self.others[f"{name}.weight"] = (torch.int8, tuple(tensor.shape))
            self.others[f"{name}.weight_scale"] = (torch.float32, tuple(tensor.shape[:1]))

    def _stored_dtype(self, tensor: Tensor, key: str = "") -> torch.dtype:
        """Scales stay in float32; other floats are stored as asked."""
        if self.dtype is None or not tensor.is_floating_point() or key.endswith("_scale"):
            return tensor.dtype
        return self.dtype

    def write_config(self, directory: Path) -> None:
        config = copy.deepcopy(self.model.config)
        config.quantization_config = SparseBitNetConfig.of(self.specs, self.int8)
        config.auto_map = AUTO_MAP
        config.architectures = [type(self.model).__name__]
        config.dtype = self.model.dtype if self.dtype is None else self.dtype
        config.save_pretrained(directory)
        (directory / PLUGIN_FILE).write_text(PLUGIN, encoding="utf-8")
        if self.model.can_generate() and self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(directory)

    def write_weights(self, directory: Path, shard_bytes: int) -> None:
        layout = self.others | self.packed
        shards = _cut(layout, shard_bytes)
        names = [WEIGHTS]
        if len(shards) > 1:
            stem = WEIGHTS.removesuffix(".safetensors")
            names = [
                f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
                for number in range(1, len(shards) + 1)
            ]
            weight_map = {
                tensor: file for file, s in zip(names, shards, strict=True) for tensor in s
            }
            total = sum(_size(*entry) for entry in layout.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        with ExitStack() as stack:
            writers: dict[str, TensorFileWriter] = {}
            files = []
            for file, shard in zip(names, shards, strict=True):
                writer = TensorFileWriter(directory / file, {n: layout[n] for n in shard})
                stack.callback(writer.abandon)
                writers |= dict.fromkeys(shard, writer)
                files.append(writer)
            for name, tensor in self._tensors():
                writers[name].write(name, tensor.to(layout[name][0]))
            for writer in files:
                writer.close()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.dense.items():
            if tensor.is_floating_point():
                check_finite(tensor, name)
            yield name, tensor
        for name, tensor in self.tables.items():
            weight, scale = quantize_rows(tensor, f"{name}.weight")
            yield f"{name}.weight", weight
            yield f"{name}.weight_scale", scale
        yield HINT, torch.empty(0, dtype=torch.uint8)
        with progress(f"packing as {self.storage}", len(self.modules)) as task:
            for name, module in self.modules.items():
                packed = pack_module(module, self.storage, name)
                for key, master in module.master_parameters().items():
                    zero = zero_matrices(master, module.shard_sizes_of(key))
                    self.zero += [f"{name}.{key}{index}" for index in zero]
                for key, tensor in packed.state_dict().items():
                    yield f"{name}.{key}", tensor
                task.advance()

    def result(self, directory: Path) -> PackResult:
        masters = [w for m in self.modules.values() for w in m.master_parameters().values()]
        weights = sum(weight.numel() for weight in masters)
        floats = [tensor.numel() for tensor in (*self.dense.values(), *self.tables.values())]
        biases = [
            math.prod(self.others[f"{name}.bias"][1])
            for name in self.modules
            if f"{name}.bias" in self.others
        ]
        return PackResult(
            directory=directory,
            modules=len(self.modules),
            weights=weights,
            packed_bytes=sum(_size(*entry) for entry in self.packed.values()),
            other_bytes=sum(_size(*entry) for entry in self.others.values()),
            float32_bytes=4 * (weights + sum(floats) + sum(biases)),
            zero=self.zero,
        )


def _read_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(directory)
    except DataError as error:
        raise ConfigError(
            f"pack: no tokenizer can be loaded from {directory} ({str(error)[:300]})"
        ) from error


def _warn_if_replaced(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Some architectures give every tokenizer beside them their own splitting of words."""
    stock = AutoTokenizer.from_pretrained(directory)
    if tokenizer_hash(stock) != tokenizer_hash(tokenizer):
        say(
            f"warning: beside this model AutoTokenizer reads the tokenizer as a "
            f"{type(stock).__name__}, which gives other ids than training used; read it with "
            "PreTrainedTokenizerFast.from_pretrained, as sparse-bitnet does"
        )


def _check_target(out: Path) -> None:
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or is_packed(out))):
        raise ConfigError(
            f"{out} exists and is not a packed model; give a new directory, or remove it first"
        )
    refuse_foreign(out)


def distinct_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's state dict with each tied tensor once, under the name it is loaded from."""
    targets = getattr(model, "all_tied_weights_keys", {})
    state = model.state_dict()
    chosen: dict[tuple[object, torch.Size], str] = {}
    for name in sorted(state, key=lambda name: name in targets):
        tensor = state[name]
        place = targets.get(name, name) if tensor.is_meta else tensor.data_ptr()
        chosen.setdefault((place, tensor.shape), name)
    kept = set(chosen.values())
    return {n: t for n, t in state.items() if n in kept or t.numel() == 0}


def _cut(layout: Layout, shard_bytes: int) -> list[list[str]]:
    """Tensor names by file: as many as fit, at least one a file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in layout.items():
        if shards[-1] and size + _size(*entry) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _size(*entry)
    return shards


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)
