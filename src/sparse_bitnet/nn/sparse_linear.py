"""The BF16 baseline: the same dynamic mask and dense gradient, without the quantizations."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bitnet.core import DENSE, Method, Pattern
from sparse_bitnet.nn.derived import DerivedModule


class MaskWithDenseGradient(torch.autograd.Function):
    """W ⊙ mask forward, the identity backward: masked weights keep learning."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class ConvertedLinear(DerivedModule, nn.Linear):
    """``nn.Linear`` that takes over the parameters of another; state dict as of ``nn.Linear``.

    Args:
        linear: the layer to take over; its parameters are shared, not copied.
        pattern: N:M along ``in_features``.
        method: the published method or one of its ablations.
        shard_sizes: rows of each logical matrix fused into ``out_features``; each has its own γ.

    Raises:
        PatternError: if M does not divide ``in_features``.
        WeightError: if the shard sizes do not sum to ``out_features``, or rows are too long for
            int32.
    """

    def __init__(
        self,
        linear: nn.Linear,
        pattern: Pattern = DENSE,
        method: Method | None = None,
        shard_sizes: tuple[int, ...] = (),
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.shard_sizes = shard_sizes
        self._configure(pattern, method)
        self.train(linear.training)

    def master_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": cast(nn.Parameter, self.weight)}

    def shard_sizes_of(self, name: str) -> tuple[int, ...]:
        return self.shard_sizes

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}"


class SparseLinear(ConvertedLinear):
    """``nn.Linear`` whose weight is masked N:M by magnitude, in every forward.

    The baseline of every comparison; with pattern ``dense`` it computes what ``nn.Linear`` does.
    Of the method only the mask's source and ``gradient`` matter here, and ``shard_sizes`` only to
    that source and to statistics.
    """

    is_ternary = False

    def forward(self, x: Tensor) -> Tensor:
        # Master weights are float32 even where the rest of the model is not.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, masked_weight(self, self.weight, *self.derived()).to(x.dtype), bias)


def masked_weight(module: DerivedModule, weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight a masked module computes with, carrying the gradient its method asks for."""
    if mask is None:
        return weight
    if module.method.gradient == "masked":
        return weight * mask
    return MaskWithDenseGradient.apply(weight, mask)
