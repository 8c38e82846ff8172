"""The BF16 baseline: the same dynamic mask and dense gradient, without the quantizations."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bitnet.core import DENSE, Method, Pattern, check_shard_sizes
from sparse_bitnet.kernels.ternarize import kept_weights
from sparse_bitnet.nn.derived import Derived, DerivedModule


class MaskWithDenseGradient(torch.autograd.Function):
    """W ⊙ mask forward, the identity backward: masked weights keep learning."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class SparseLinear(DerivedModule, nn.Linear):
    """``nn.Linear`` whose weight is masked N:M by magnitude, in every forward.

    The baseline of every comparison; with pattern ``dense`` it computes what ``nn.Linear`` does.
    Parameters and state dict are those of ``nn.Linear``.

    Args and raises: as :class:`SparseBitLinear`. Of the method only the mask's source and
    ``gradient`` matter here, and ``shard_sizes`` only to that source and to statistics.
    """

    is_ternary = False

    def __init__(
        self,
        linear: nn.Linear,
        pattern: Pattern = DENSE,
        method: Method | None = None,
        shard_sizes: tuple[int, ...] = (),
    ) -> None:
        nn.Module.__init__(self)
        pattern.check_divides(linear.in_features)
        check_shard_sizes(shard_sizes, linear.out_features)
        self.shard_sizes = shard_sizes
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._configure(pattern, method)
        self.train(linear.training)

    def master_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": cast(nn.Parameter, self.weight)}

    def shard_sizes_of(self, name: str) -> tuple[int, ...]:
        return self.shard_sizes

    def derive(self, name: str) -> Derived:
        """The mask, bool ``[out, in]``; None if dense."""
        return (derive_mask(self, name, self.shard_sizes),)

    def forward(self, x: Tensor) -> Tensor:
        # Master weights are float32 even where the rest of the model is not.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, masked_weight(self, self.weight, *self.derived()).to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}"


def derive_mask(
    module: DerivedModule, name: str, shard_sizes: tuple[int, ...] = ()
) -> Tensor | None:
    """The mask of a full-precision weight, boolean of its shape; None if dense.

    A GPU's compiler gets it as plain operations: one kernel instead of a dozen, made anew for
    another pattern.
    """
    if module.is_dense:
        return None
    weight = module.master_parameters()[name]
    if torch.compiler.is_compiling() and weight.is_cuda and module.method.mask_source == "master":
        return _mask_expression(weight.detach(), module.pattern)
    return kept_weights(weight, module.n_and_m, module.method, shard_sizes)


def _mask_expression(weight: Tensor, pattern: Pattern) -> Tensor:
    """``core.nm_mask`` as one expression: the weights that beat this one, counted."""
    magnitude = weight.abs().unflatten(-1, (-1, pattern.m))
    lane = torch.arange(pattern.m, device=weight.device)
    own, other = magnitude.unsqueeze(-1), magnitude.unsqueeze(-2)
    ahead = (other > own) | ((other == own) & (lane.unsqueeze(0) < lane.unsqueeze(1)))
    return (ahead.sum(-1) < pattern.n).flatten(-2)


def masked_weight(module: DerivedModule, weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weight a masked module computes with, carrying the gradient its method asks for."""
    if mask is None:
        return weight
    if module.method.gradient == "masked":
        return weight * mask
    return MaskWithDenseGradient.apply(weight, mask)
