"""The published method and its ablations as one configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from sparse_bitnet.core.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """The choices inside one Sparse-BitNet layer. The defaults are the published method.

    Attributes:
        order: quantize the dense weight and then mask it, or take γ from the kept weights only.
        mask_source: rank by the magnitude of the master weight, or of the quantized one (whose
            ties make it unstable).
        gradient: let every master weight learn (dual straight-through), or only the kept ones.
        activation_bits: int8 absmax or int4 absmean per token.
        backward: compute both products of the backward pass in the computation's own dtype (bf16
            under autocast), or in fp8, which is faster and rounds gradients. This one is not
            published, and changes no forward pass.

    Raises:
        ConfigError: for a value outside the published ones.

    Source: section 3 and the ablation table of arXiv 2603.05168.
    """

    order: Literal["quant-then-mask", "mask-then-quant"] = "quant-then-mask"
    mask_source: Literal["master", "quantized"] = "master"
    gradient: Literal["dense", "masked"] = "dense"
    activation_bits: Literal[8, 4] = 8
    backward: Literal["full", "fp8"] = "full"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Method).items():
            value = getattr(self, name)
            if value not in get_args(hint):
                raise ConfigError(f"method.{name} is {value!r}; choose among {get_args(hint)}")
        if self.order == "mask-then-quant" and self.mask_source == "quantized":
            raise ConfigError(
                "method: mask-then-quant masks before anything is quantized, so mask_source must "
                "be 'master'"
            )
