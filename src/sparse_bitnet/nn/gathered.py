"""A weight gathered by FSDP2 as two bits and γ: a float parameter's place, without its values.

Autograd needs a parameter of the master weight's shape and dtype to leave a gradient at, and
nothing else of it: a ternary product reads the ternary weight. So this tensor has that shape and
dtype, and holds what was gathered in their stead, in memory that FSDP2 frees and fills again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_bitnet.core import ConfigError

aten = torch.ops.aten


class GatheredTernary(Tensor):
    """Stands for a master weight ``[..., out, in]`` whose values are on other ranks.

    Args:
        packed: the ternary weight as :mod:`sparse_bitnet.formats.two_bit`.
        scale: γ, float32 ``[..., shards]``.
        shape: of the master weight.
        dtype: of its gradient.

    Raises:
        ConfigError: where an operation would read the master weight.
    """

    packed: Tensor
    scale: Tensor

    @staticmethod
    def __new__(
        cls, packed: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> GatheredTernary:
        made: GatheredTernary = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.device
        )
        made.packed, made.scale = packed, scale
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GatheredTernary({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["packed", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, size: torch.Size, stride: tuple[int, ...]
    ) -> GatheredTernary:
        return GatheredTernary(inner["packed"], inner["scale"], size, dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        own = args[0]
        if func in ALIASES:
            packed, scale = (aten.alias.default(t) for t in (own.packed, own.scale))
            return GatheredTernary(packed, scale, own.shape, own.dtype)
        if func is aten.unbind.int:  # experts
            pairs = zip(own.packed.unbind(0), own.scale.unbind(0), strict=True)
            return [GatheredTernary(p, s, own.shape[1:], own.dtype) for p, s in pairs]
        if func in FACTORIES:  # a gradient's memory
            meta = torch.empty(own.shape, dtype=own.dtype, device="meta")
            return func(meta, *args[1:], **{"device": own.device, **(kwargs or {})})
        raise ConfigError(
            f"{func} would read a master weight {tuple(own.shape)} of which only the ternary "
            "weight is gathered: read it outside of forward and backward, from its shards"
        )


# FSDP2 takes its own view of what it gathered, of the same shape and strides.
ALIASES = {
    aten.detach.default,
    aten.alias.default,
    aten.as_strided.default,
    aten.view.default,
}
FACTORIES = {
    aten.zeros_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_empty.default,
}
