"""Packed and converted models in transformers: importing this module lets ``from_pretrained`` load
them.

transformers calls a quantizer twice: with the model on the meta device, where modules are swapped
for packed or converted ones (and packed files are checked against the result), and once the tensors
are in. Parameters and buffers have the names of the stored tensors, so no conversion is needed in
between.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_bitnet.core import (
    CheckpointError,
    ConfigError,
    Method,
    PackedFormatError,
    PatternError,
    WeightError,
)
from sparse_bitnet.files import write_text
from sparse_bitnet.nn import record
from sparse_bitnet.nn.convert import LINEAR, convert_recorded
from sparse_bitnet.nn.int8_head import swap_int8
from sparse_bitnet.nn.pack import swap_packed
from sparse_bitnet.nn.packed_module import PackedSpec, StoredModule
from sparse_bitnet.packed.config import HINT, QUANT_METHOD, SparseBitNetConfig
from sparse_bitnet.packed.tensor_file import checksum_metadata
from sparse_bitnet.packed.verify import check_shard_name, is_outside, verify_files

PLUGIN = '''\
"""Lets transformers load this model with trust_remote_code=True.

Needs: pip install sparse-bitnet. Importing the package is what makes the packed weights known;
`import sparse_bitnet` before loading does the same without trusting any code from here.
"""

from sparse_bitnet.packed.quantizer import PackedModelConfig

__all__ = ["PackedModelConfig"]
'''
PLUGIN_FILE = "hf_plugin.py"
AUTO_MAP = {"AutoConfig": "hf_plugin.PackedModelConfig"}

register_quantization_config(QUANT_METHOD)(SparseBitNetConfig)


class _Quantizer(HfQuantizer):
    requires_calibration = True  # a model is packed or converted by us, not while loading
    is_trainable = False

    def is_serializable(self) -> bool:
        return True


@register_quantizer(QUANT_METHOD)
class SparseBitNetQuantizer(_Quantizer):
    """Swaps packed modules in, refuses files that do not fit, writes checksums when saving."""

    is_compileable = True
    quantization_config: SparseBitNetConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        names = {name for name, _ in model.named_modules()}

        def here(name: str) -> str | None:
            found = record.name_in(model, name, names)
            if found is None and not is_outside(model, name):
                raise _foreign(model, f"{name}: the model has no such module")
            return found

        specs: dict[str, PackedSpec] = {}
        for name, spec in self.quantization_config.specs().items():
            if (found := here(name)) is not None:
                specs[found] = spec
        int8 = [found for name in self.quantization_config.int8 if (found := here(name))]
        try:
            swap_packed(model, specs)
            swap_int8(model, int8)
        except (ConfigError, PatternError, WeightError) as error:
            raise _foreign(model, str(error)) from None
        if checkpoint_files:
            verify_files(_inside(checkpoint_files, model), model)
        like: Any = model
        ignored = like._keys_to_ignore_on_load_unexpected
        kind = set if isinstance(ignored, set) else list  # of transformers 5.4
        like._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), re.escape(HINT)])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, StoredModule) and not any(b.is_meta for b in module.buffers()):
                module.check()
        # Only a directory with the plugin file may point to it; the config alone writes none.
        if getattr(model.config, "auto_map", None) == AUTO_MAP:
            del model.config.auto_map
        model.save_pretrained = record.SavePretrained(model, {"auto_map": AUTO_MAP}, _write_plugin)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """None: stored names are the model's own, not those of some original checkpoint."""
        return []

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state = model.state_dict() | {HINT: torch.empty(0, dtype=torch.uint8)}
        return state, checksum_metadata(state)


def _write_plugin(directory: Path) -> None:
    write_text(directory / PLUGIN_FILE, PLUGIN)


@register_quantization_config(record.QUANT_METHOD)
class TrainedConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a converted model's linears, as :mod:`sparse_bitnet.nn.record`
    writes it.

    Raises:
        CheckpointError: if a field is missing or unknown.
    """

    def __init__(self, quant_method: str = record.QUANT_METHOD, **fields: Any) -> None:
        if fields.keys() != {"version", "pattern", "kind", "method", "rules", "modules"}:
            raise _damaged(f"its fields are {sorted(fields)}")
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' enum is closed
        self.__dict__.update(fields)


@register_quantizer(record.QUANT_METHOD)
class TrainedQuantizer(_Quantizer):
    """Converts a model while it is loaded: the modules that were converted when it was saved.

    A base model lacks the saved one's prefix and head, and a model with another head has one that
    was never converted.
    """

    is_trainable = True
    is_saved_record = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.is_saved_record:
            raise CheckpointError(
                "config.json has the quantization_config of a converted model, from whose "
                "configuration this one was made; remove that entry to load a dense model"
            )
        described = self.quantization_config.to_dict()
        chosen = {name: described[name] for name in ("pattern", "kind", "rules")}
        try:
            if chosen["kind"] not in LINEAR:
                raise ConfigError(f"kind is {chosen['kind']!r}")
            modules = record.modules_here(model, described["modules"])
            convert_recorded(model, modules, **chosen, method=Method(**described["method"]))
        except (ConfigError, PatternError, TypeError, AttributeError) as error:
            raise _damaged(f"the {type(model).__name__} cannot be converted so: {error}") from None
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        # From now on it is a model like any other, which trains.
        self.remove_quantization_config(model)
        for module in model.modules():
            vars(getattr(module, "config", self)).pop("_is_quantized", None)
        return model

    def update_attn_implementation(self, config: Any) -> Any:
        """Read the files that are there. (transformers up to 5.17 calls :meth:`update_tp_plan`.)"""
        if getattr(config, "transformers_weights", None) == record.ABSENT:
            del config.transformers_weights
            self.is_saved_record = True
        return config

    update_tp_plan = update_attn_implementation


class PackedModelConfig(PreTrainedConfig):
    """Config class that ``hf_plugin.py`` names; importing it has registered the quantizer."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # Not at the top: this file may be imported while transformers itself is.
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(*args, **kwargs | {"trust_remote_code": False})


def _inside(files: list[str], model: Any) -> list[Path]:
    """Refuse weight files that an edited index put elsewhere."""
    root = Path(getattr(model.config, "name_or_path", ""))
    for file in files:
        path = Path(file)
        check_shard_name(path.name, path.parent)
        outside = not path.is_relative_to(root) or ".." in path.relative_to(root).parts
        if root.is_dir() and outside:
            check_shard_name(file, root)
    return [Path(file) for file in files]


def _damaged(reason: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization_config is damaged or foreign: {reason}; get the file again"
    )


def _foreign(model: nn.Module, reason: str) -> PackedFormatError:
    return PackedFormatError(
        f"config.json does not describe this {type(model).__name__}: {reason}; its "
        "quantization_config and the rest are of different models, pack the model again"
    )
