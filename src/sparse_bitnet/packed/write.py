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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.console import progress, say
from sparse_bitnet.core import ConfigError, DataError, WeightError, check_finite, zero_matrices
from sparse_bitnet.data.tokenizer import load_tokenizer, tokenizer_hash
from sparse_bitnet.files import atomic_directory
from sparse_bitnet.formats import StorageName
from sparse_bitnet.formats import storage as storage_named
from sparse_bitnet.nn import converted_modules, master_weights
from sparse_bitnet.nn.check import check_packed
from sparse_bitnet.nn.convert import warn_of_zeros
from sparse_bitnet.nn.int8_head import int8_modules, quantize_rows
from sparse_bitnet.nn.pack import empty_packed, pack_module, packed_spec
from sparse_bitnet.nn.wrappers import check_adapters, unwrapped
from sparse_bitnet.packed.config import HINT, QUANT_METHOD, SparseBitNetConfig
from sparse_bitnet.packed.load import DType
from sparse_bitnet.packed.quantizer import AUTO_MAP, PLUGIN, PLUGIN_FILE
from sparse_bitnet.packed.sizes import readable_bytes
from sparse_bitnet.packed.tensor_file import file_size, write_tensors
from sparse_bitnet.packed.verify import INDEX, check_output, is_stored_as
from sparse_bitnet.train.export import load_trained

HeadName = Literal["float", "int8"]
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class PackResult:
    """Result of :func:`pack`. ``str()`` gives it in a line."""

    directory: Path  # where it is
    # how many were packed
    modules: int
    weights: int
    packed_bytes: int  # what the packed weights and their scales take
    other_bytes: int  # what embeddings, norms, head and biases take
    float32_bytes: int  # what the same model takes in float32
    zero: list[str]  # matrices that are all zero, which a warning names too

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
    overwrite: bool = False,
) -> PackResult:
    """Write a trained model as a packed directory that ``from_pretrained`` loads.

    Little more memory is needed than the trained model takes: that of the packed one.

    Args:
        source: a converted model, also inside DDP or ``torch.compile``, or the directory of a
            trained one.
        out: the directory to write, new or empty; it appears whole or not at all.
        storage: ``"two-bit"`` (2 bits a weight, fastest to unpack) or ``"trits"`` (1.6 bits).
        head: ``"int8"`` stores the output head, and an embedding tied to it, as int8 with a scale
            for each row; ``"float"`` leaves them as they are.
        dtype: of embeddings, norms, head and biases; the model's own when left out.
        tokenizer: to store beside it; that of the directory when left out.
        shard_bytes: start another weight file when one grows beyond this.
        check: first run a few tokens through the trained model, and give what each layer gets to
            its packed form, one at a time: all must be called and give equal results.
        overwrite: replace a packed directory, if it has no files of somebody else.

    Raises:
        CheckpointError: if the source directory is damaged or not a trained model.
        ConfigError: if nothing in the model is ternary, it has adapters, ``out`` is
            there and not to be replaced, the tokenizer cannot be loaded, or the head
            cannot be int8.
        WeightError: if a weight holds NaN, or breaks its N:M pattern; names module and group.
        WeightError: if the packed model would compute something else; names the modules.
    """
    out = Path(out)
    storage_named(storage)
    is_packed = partial(is_stored_as, method=QUANT_METHOD)
    check_place = partial(check_output, out, "a packed model", is_packed, overwrite)
    check_place()
    if isinstance(source, str | Path):
        if is_packed(Path(source)):
            raise ConfigError(f"pack: {source} is packed already; give the model it was made from")
        model, own = load_trained(source)
    else:
        model, own = source, None
    model = unwrapped(model)
    check_adapters(model, "pack")
    tokenizer = own if tokenizer is None else tokenizer
    if isinstance(tokenizer, str | Path):
        try:
            tokenizer = load_tokenizer(tokenizer)
        except DataError as error:
            raise ConfigError(
                f"pack: no tokenizer can be loaded from {tokenizer} ({str(error)[:300]})"
            ) from error
    if check:
        check_packed(model, storage)
    form = _PackedForm(model, storage, head, None if dtype is None else getattr(torch, dtype))
    with atomic_directory(out, check_place) as directory:
        form.write_config(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
            _warn_if_replaced(directory, tokenizer)
        form.write_weights(directory, shard_bytes)
    warn_of_zeros(form.zero)
    return PackResult(
        directory=out,
        modules=len(form.modules),
        weights=form.weights,
        packed_bytes=_size(form.packed),
        other_bytes=_size(form.others),
        float32_bytes=form.float32_bytes,
        zero=form.zero,
    )


class PackedSizes(NamedTuple):
    """Bytes of packed weights and their scales; of embeddings, norms, head and biases; and of the
    weight file with its header, if it is one."""

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
    form = _PackedForm(model, storage, head, getattr(torch, dtype), empty=True)
    return PackedSizes(_size(form.packed), _size(form.others), file_size(form.tensors))


class _PackedForm:
    """Tensors and config.json of a model's packed form; ``empty`` ones on the meta device tell
    sizes. ``packed`` has packed weights and their scales, by their names in the files, ``others``
    embeddings, norms, head and biases, in ``dtype`` or their own."""

    def __init__(
        self,
        model: PreTrainedModel,
        storage: StorageName,
        head: HeadName,
        dtype: torch.dtype | None,
        empty: bool = False,
    ) -> None:
        self.model, self.dtype, self.empty = model, dtype, empty
        self.modules = dict(converted_modules(model))
        if not self.modules:
            raise ConfigError(
                "pack: the model has no ternary modules; convert and train it first (a packed "
                "model cannot be packed again)"
            )
        self.specs = {n: packed_spec(module, storage, n) for n, module in self.modules.items()}
        self.int8 = int8_modules(model) if head == "int8" else []
        self.weights = sum(master.weight.numel() for master in master_weights(model))
        self.zero: list[str] = []
        state = distinct_tensors(model)
        self.float32_bytes = 4 * sum(tensor.numel() for tensor in state.values())
        self.packed: dict[str, Tensor] = {}
        self.others = {HINT: torch.empty(0, dtype=torch.uint8)}
        with progress(f"packing as {storage}", len(self.modules)) as task:
            for name, module in self.modules.items():
                if empty:
                    packed = empty_packed(module, self.specs[name], name)
                else:
                    packed = pack_module(module, storage, name)
                    for key, master in module.master_parameters().items():
                        zero = zero_matrices(master, module.shard_sizes_of(key))
                        self.zero += [f"{name}.{key}{index}" for index in zero]
                for key, tensor in packed.state_dict().items():
                    if key == "bias":
                        self.others[f"{name}.bias"] = self._cast(tensor, f"{name}.bias")
                    else:
                        self.packed[f"{name}.{key}"] = tensor
                task.advance()
        inside = tuple(f"{name}." for name in self.modules)
        for name, tensor in state.items():
            if name.startswith(inside):
                continue
            if name.removesuffix(".weight") not in self.int8:
                if tensor.is_floating_point() and not empty:
                    check_finite(tensor, name)
                self.others[name] = self._cast(tensor, name)
                continue
            if empty:
                weight = tensor.to("meta", torch.int8)
                scale = tensor.new_empty(len(tensor), dtype=torch.float32, device="meta")
            else:
                weight, scale = quantize_rows(tensor, name)
            self.others |= {name: weight, f"{name}_scale": scale}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.others | self.packed

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        tensor = tensor.to("meta") if self.empty else tensor
        if self.dtype is None or not tensor.is_floating_point():
            return tensor
        cast = tensor.to(self.dtype)
        if not self.empty and not bool(cast.isfinite().all()):
            raise WeightError(
                f"pack: {name} has values beyond {str(self.dtype).removeprefix('torch.')}; give "
                "--dtype bfloat16 or float32"
            )
        return cast

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
        tensors = self.tensors
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
        for file, names in split.filename_to_tensors.items():
            write_tensors(directory / file, {name: tensors[name] for name in names})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _warn_if_replaced(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Some architectures give every tokenizer beside them their own splitting of words."""
    stock = AutoTokenizer.from_pretrained(directory)
    if tokenizer_hash(stock) != tokenizer_hash(tokenizer):
        say(
            f"warning: beside this model AutoTokenizer reads the tokenizer as a "
            f"{type(stock).__name__}, which gives other ids than training used; read it with "
            "PreTrainedTokenizerFast.from_pretrained, as sparse-bitnet does"
        )


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


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
