"""Converted models inside the wrappers of others: DDP, ``torch.compile``, PEFT's adapters.

A LoRA adapter beside a ternary layer is an update of another kind than the layer's own: it is added
behind the product, and once it is merged most of it is lost in the rounding. PEFT can add it to a
parameter instead: the layer then masks and quantizes the sum, and a merge changes nothing:

    convert(model, "6:8")
    LoraConfig(target_modules=[], target_parameters=["q_proj.weight", "down_proj.weight"])
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sparse_bitnet.core import ConfigError
from sparse_bitnet.nn.derived import DerivedModule


def unwrapped(model: Any) -> Any:
    """The model inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def check_adapters(model: nn.Module, verb: Literal["convert", "train", "pack"]) -> None:
    """Refuse adapters that would be lost.

    Raises:
        ConfigError: naming the layer; to convert and to pack, for any adapter that is still a
            module of its own; to train, for one beside a converted layer (above). To pack, also
            for PEFT's model around one, which has learned a prompt if no layer has an adapter.
    """
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Module):
            continue
        if verb != "train":
            raise ConfigError(
                f"{verb}: {name} has an adapter of its own, which would be left out; "
                "merge it first: model = model.merge_and_unload()"
            )
        if isinstance(base, DerivedModule) and not hasattr(module, "parameter_name"):
            weight = f"{name.rpartition('.')[2]}.weight"
            raise ConfigError(
                f"{name}: this adapter is added behind the ternary product, and merging it loses "
                "most of it to rounding; let it join the weight instead, with "
                f"LoraConfig(target_modules=[], target_parameters=['{weight}', …])"
            )
    if verb == "pack" and hasattr(model, "get_base_model"):
        raise ConfigError(
            f"pack: the prompt that a {type(model).__name__} has learned would be left out; pack "
            "the model without it: model.get_base_model()"
        )
