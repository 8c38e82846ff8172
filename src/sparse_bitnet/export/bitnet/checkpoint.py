"""Verified ``bitnet`` checkpoint of transformers, read as float32 master weights.

The files are somebody else's, so nothing in them is believed or run: JSON and safetensors headers
are read with limits, code beside the model (``auto_map``) is ignored, pickled weights are not read,
and every tensor has to have the name, shape and kind that ``config.json`` implies before memory is
taken for it. See write.py for the format.

γ and the ternary weights T are derived from master weights here. Stored T come back from

    W = T·γ/d       with d the fraction of T that is not zero,

because its mean magnitude is γ, and |W/γ| = 1/d ≥ 1 rounds and clips to one. Checkpoints of
``quantization_mode: online`` hold master weights already.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from sparse_bitnet.console import progress, say
from sparse_bitnet.core import ConfigError, PackedFormatError, check_finite
from sparse_bitnet.core.ternary import SMALLEST_SCALE
from sparse_bitnet.files import refuse_special
from sparse_bitnet.formats import row_quarters
from sparse_bitnet.formats.two_bit import PER_BYTE
from sparse_bitnet.packed.tensor_file import read_tensors
from sparse_bitnet.packed.verify import CONFIG, read_json, weight_files
from sparse_bitnet.train.dense import foreign_code, no_bars

SCALE = "weight_scale"
LONGEST_NAME = 200
COUNTED = re.compile(r"^(?!max_)(\w*layers|\w*depths?|(num|n)_\w*(layer|block)\w*)$", re.IGNORECASE)
NAME = re.compile(r"[\w.-]*(\*[\w.-]*){0,2}")
DERIVED_BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # older checkpoints store it


class BitNetCheckpoint:
    """A verified checkpoint directory.

    Attributes:
        format: linear class and quantization mode.
        ternary: names of the layers that are ternary.
        rules: for ``convert``: leave alone what the checkpoint leaves in full precision.

    Raises:
        PackedFormatError: if a file is damaged, or they contradict each other.
        ConfigError: if it is of another format, or uses a part of it that is not known here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            refuse_special(*directory.iterdir())
        except (OSError, ValueError) as error:
            raise PackedFormatError(f"{directory} cannot be read: {error}") from None
        self._config = read_json(directory / CONFIG)
        described = self._config.pop("quantization_config", None)
        self._config.pop("auto_map", None)
        self._linear_class, self._mode, skipped = _read_quantization(described, directory)
        self.format = f"bitnet ({self._linear_class}, {self._mode})"
        self._entries = _entries(directory)
        if skipped is not None:
            _check_names(skipped, len(self._entries), directory)
        self._skeleton = skeleton = self._build()
        linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
        patterns = get_keys_to_not_convert(skeleton) if skipped is None else skipped
        self.ternary = {name for name in linears if should_convert_module(name, patterns)}
        head = skeleton.get_output_embeddings()
        for name, module in linears.items():
            if module is head and name in self.ternary:
                raise ConfigError(
                    f"{directory}: the output head {name} is ternary; here heads stay in full "
                    "precision, so this checkpoint cannot be imported"
                )
        left = [name for name in linears if name not in self.ternary and linears[name] is not head]
        left += [
            name
            for name, module in skeleton.named_modules()
            if any(weight.dim() == 3 for weight in module.parameters(recurse=False))
        ]
        self.rules = {rf"^{re.escape(name)}$": "skip" for name in left}
        self._expected = {n: tuple(t.shape) for n, t in skeleton.state_dict().items()}
        self._tied = set(getattr(skeleton, "all_tied_weights_keys", {}))
        self._check()

    def load(self) -> PreTrainedModel:
        """The model with float32 master weights, in evaluation mode, not converted."""
        state = dict(self._tensors())
        with no_bars():
            model: PreTrainedModel = type(self._skeleton).from_pretrained(
                None, config=self._skeleton.config, state_dict=state, dtype=torch.float32
            )
        path = self.directory / "generation_config.json"
        if path.is_file():
            model.generation_config = _read_generation(path, model.generation_config)
        return model.eval()

    def _build(self) -> PreTrainedModel:
        """The model on the meta device, so that no size in the config takes memory.

        Layers take time to build, so a model may not claim more of them than there are tensors.
        """
        path = self.directory / CONFIG
        kind = self._config.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise ConfigError(
                f"{path}: transformers has no architecture {str(kind)[:80]!r}; code that comes "
                "with a checkpoint is not run"
            )
        fetched = foreign_code(self._config)
        if fetched:
            raise PackedFormatError(f"{path}: {fetched}; no code is fetched, get the file again")
        for key, value in _numbers(self._config):
            if COUNTED.search(key) and value > len(self._entries):
                raise PackedFormatError(
                    f"{path}: {key[:80]} is {str(value)[:40]}, but there are {len(self._entries)} "
                    "tensors; the file was edited or damaged, get it again"
                )
        with _reading(path), torch.device("meta"):
            config = CONFIG_MAPPING[kind].from_dict(self._config)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model

    def _check(self) -> None:
        """Check that the files hold every tensor of the model as it should be, and no other."""
        where = self.directory
        found = set()
        for name, (path, entry) in self._entries.items():
            module, _, part = name.rpartition(".")
            if part == SCALE and module in self.ternary and self._mode == "offline":
                fits = entry.shape in ((), (1,)) and entry.dtype.is_floating_point
                wanted: object = "one float"
            elif name in self._expected:
                found.add(name)
                fits, wanted = self._fits(name, entry)
            else:
                raise PackedFormatError(
                    f"{path}: tensor {name[:200]!r} belongs to no part of a "
                    f"{type(self._skeleton).__name__} with this config.json; the two are of "
                    "different models, get the checkpoint again"
                )
            if not fits:
                raise PackedFormatError(
                    f"{path}: tensor {name} is {entry.dtype} {list(entry.shape)}, but config.json "
                    f"({self.format}) asks for {wanted}; one of the two was edited, get the "
                    "checkpoint again"
                )
        missing = self._expected.keys() - found - self._tied
        if self._mode == "offline":
            scales = {f"{name}.{SCALE}" for name in self.ternary}
            missing |= scales - self._entries.keys()
        if missing:
            raise PackedFormatError(
                f"{where}: {len(missing)} tensors are missing, {min(missing)} for example; get the "
                "checkpoint again"
            )

    def _fits(self, name: str, entry: Tensor) -> tuple[bool, str]:
        shape = self._expected[name]
        module, _, part = name.rpartition(".")
        plain = entry.shape == shape and entry.dtype.is_floating_point
        wanted = f"floats {list(shape)}"
        if part == "weight" and module in self.ternary and self._mode == "offline":
            rows = (shape[0] // PER_BYTE, *shape[1:])
            packed = entry.shape == rows and entry.dtype == torch.uint8 and not shape[0] % PER_BYTE
            # The second linear class also takes weights that are ternary but not packed.
            unpacked = plain and self._linear_class == "autobitlinear"
            return packed or unpacked, f"{torch.uint8} {list(rows)}"
        return plain, wanted

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state dict of master weights, one tensor after the other."""
        with progress("reading bitnet", len(self._entries)) as task:
            for name in self._entries:
                module, _, part = name.rpartition(".")
                task.advance()
                if module not in self.ternary or self._mode == "online":
                    yield name, self._floats(name)
                elif part == "weight":
                    yield name, _master(self._ternary_weight(name), self._gamma(module))
                elif part == "bias":
                    # The second linear class scales the bias together with the product.
                    scaled = self._linear_class == "autobitlinear"
                    yield name, self._floats(name) * (self._gamma(module) if scaled else 1.0)

    def _ternary_weight(self, name: str) -> Tensor:
        tensor = self._read(name)
        if tensor.dtype == torch.uint8:
            return row_quarters.unpack(tensor, f"{self._entries[name][0]}: {name}")
        ternary = tensor.to(torch.int8)
        if not torch.equal(ternary.to(tensor.dtype), tensor) or int(ternary.abs().max()) > 1:
            raise PackedFormatError(
                f"{self._entries[name][0]}: tensor {name} is not ternary, which it has to be "
                "beside a weight_scale; get the checkpoint again"
            )
        return ternary

    def _gamma(self, module: str) -> float:
        name = f"{module}.{SCALE}"
        scale = float(self._read(name).float().reshape(()))
        gamma = scale
        if self._linear_class == "bitlinear":
            gamma = 1 / scale if scale else 0.0
        # Absmean scales end at 1e-5; one stored in bfloat16 may be rounded below.
        if not 0.99 * SMALLEST_SCALE < gamma < torch.finfo(torch.float32).max:
            raise PackedFormatError(
                f"{self._entries[name][0]}: tensor {name} is {scale}, which is the scale of no "
                "ternary weight; the file was edited or damaged, get it again"
            )
        return gamma

    def _floats(self, name: str) -> Tensor:
        tensor = self._read(name).float()
        check_finite(tensor, f"{self._entries[name][0]}: {name}")
        return tensor

    def _read(self, name: str) -> Tensor:
        return self._entries[name][1]


def _master(ternary: Tensor, gamma: float) -> Tensor:
    """A float32 weight from which γ and T are derived again; see the top of this file."""
    density = int(torch.count_nonzero(ternary)) / max(1, ternary.numel())
    return ternary.float() * (gamma / density if density else 0.0)


def _entries(directory: Path) -> dict[str, tuple[Path, Tensor]]:
    """Tensor name → the file that holds it, and what its header says."""
    found: dict[str, tuple[Path, Tensor]] = {}
    for path in weight_files(directory):
        for name, entry in read_tensors(path).tensors.items():
            if name in found:
                raise PackedFormatError(
                    f"{path}: tensor {name} is in {found[name][0].name} too; get the checkpoint "
                    "again"
                )
            if not DERIVED_BUFFER.search(name):
                found[name] = (path, entry)
    return found


def _read_quantization(described: Any, directory: Path) -> tuple[str, str, list[str] | None]:
    """Linear class, mode, and the names that are not converted (None: the default ones)."""
    where = directory / CONFIG
    if not isinstance(described, dict) or described.get("quant_method") != "bitnet":
        raise ConfigError(
            f"{where}: this is no checkpoint of quant_method bitnet; train or convert a model of "
            "float weights with model.source, and pack one of ours as it is"
        )
    linear_class = described.get("linear_class", "bitlinear")
    mode = described.get("quantization_mode", "offline")
    skipped = described.get("modules_to_not_convert")
    if linear_class not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
        raise ConfigError(
            f"{where}: linear_class {str(linear_class)[:40]!r} and quantization_mode "
            f"{str(mode)[:40]!r} are not known; there are bitlinear and autobitlinear, offline and "
            "online"
        )
    if linear_class == "bitlinear":
        mode = "offline"  # it knows no other, whatever the file says
    if described.get("use_rms_norm"):
        raise ConfigError(
            f"{where}: use_rms_norm puts a norm into every linear layer, which the layers here do "
            "not have; this checkpoint cannot be imported"
        )
    if skipped is not None and not (
        isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)
    ):
        raise PackedFormatError(f"{where}: modules_to_not_convert is {str(skipped)[:80]}, no list")
    return linear_class, mode, skipped


def _check_names(names: list[str], most: int, directory: Path) -> None:
    """transformers reads them as regular expressions, which can be made to take for ever."""
    for name in names:
        if len(names) > most or len(name) > LONGEST_NAME or not NAME.fullmatch(name):
            raise PackedFormatError(
                f"{directory / CONFIG}: modules_to_not_convert has {len(names)} entries, one of "
                f"them {name[:80]!r}, where names of modules are expected; get the checkpoint again"
            )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """The numbers of a JSON value with the keys that they stand under."""
    if isinstance(value, dict):
        for inner, one in value.items():
            yield from _numbers(one, inner)
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one, key)
    elif isinstance(value, int | float):
        yield key, value


def _read_generation(path: Path, default: GenerationConfig) -> GenerationConfig:
    """A checkpoint's generation settings; many have some that contradict each other."""
    values = read_json(path)
    with _reading(path):
        config = GenerationConfig.from_dict(values)
        try:
            config.validate(strict=True)
        except ValueError as error:
            reason = str(error).splitlines()[1:2] or [str(error)]
            say(f"warning: {path} is left out, transformers would not write it: {reason[0][:200]}")
            return default
    return config


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever transformers raises for a damaged file, in our words."""
    try:
        yield
    except PackedFormatError:
        raise
    except Exception as error:
        raise PackedFormatError(
            f"{path}: transformers cannot read it: {str(error)[:300]}; the file was edited or "
            "damaged, get it again"
        ) from error
