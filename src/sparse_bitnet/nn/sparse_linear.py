"""The full-precision twin: the same dynamic mask and dense gradient, without the quantizations."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bitnet.core import DENSE, Method, Pattern, check_segments
from sparse_bitnet.nn.derived import DerivedModule, whole
from sparse_bitnet.nn.sparse_bit_linear import kept_weights


class MaskWithDenseGradient(torch.autograd.Function):
    """W ⊙ mask forward, the identity backward: masked weights keep learning."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class SparseLinear(DerivedModule, nn.Linear):
    """``nn.Linear`` whose weight is masked N:M by magnitude at every optimizer step.

    The baseline of every comparison; with pattern ``dense`` it computes what ``nn.Linear`` does.
    Parameters and state dict are those of ``nn.Linear``; the buffer ``mask`` (bool ``[out, in]``)
    is derived.

    Args and raises: as :class:`SparseBitLinear`. Of the method only the mask's source and
    ``gradient`` matter here, and ``segments`` only to that source and to statistics.
    """

    mask: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        pattern: Pattern = DENSE,
        method: Method | None = None,
        segments: tuple[int, ...] = (),
    ) -> None:
        nn.Module.__init__(self)
        pattern.check_divides(linear.in_features)
        check_segments(segments, linear.out_features)
        self.segments = segments
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        mask = torch.ones_like(linear.weight, dtype=torch.bool)
        self.register_buffer("mask", mask, persistent=False)
        self._track(pattern, method or Method())
        self.train(linear.training)
        self.refresh()

    def master_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": cast(nn.Parameter, self.weight)}

    def segments_of(self, name: str) -> tuple[int, ...]:
        return self.segments

    def derived(self, weight: Tensor) -> dict[str, Tensor]:
        return {"mask": kept_weights(weight, self.pattern, self.method, self.segments)}

    def derive(self) -> None:
        self._fill("mask", self.derived(whole(self.weight))["mask"])

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.refresh()
        # Master weights are float32 even where the rest of the model is not.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, masked_weight(self, self.weight, self.mask).to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}"


def masked_weight(module: DerivedModule, weight: Tensor, mask: Tensor) -> Tensor:
    """The weight a masked module computes with, carrying the gradient its method asks for."""
    if module.is_dense:
        return weight
    if module.method.gradient == "masked":
        return weight * mask
    return MaskWithDenseGradient.apply(weight, mask)
