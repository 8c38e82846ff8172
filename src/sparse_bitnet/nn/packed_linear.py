"""A linear layer that runs from packed ternary weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core import check_shard_sizes
from sparse_bitnet.kernels.registry import TernaryWeight, integer_linear, prepare
from sparse_bitnet.nn.packed_module import PackedModule, PackedSpec


class PackedLinear(PackedModule):
    """The inference form of ``SparseBitLinear``: the same integers, scaled once.

    Outputs are equal to the last bit.

    Buffers, which are also its state dict: ``weight`` (uint8 ``[out, bytes]``), ``weight_scale``
    (float32 ``[shards]``) and, if ``bias``, ``bias`` (``[out]``, in the model's dtype).

    Args:
        in_features, out_features, bias: as of ``nn.Linear``.
        spec: format, pattern, activation bits, shard sizes.
        where: the module's name, for error messages.
        device, dtype: where to make the (empty) buffers, and the dtype of the bias.

    Raises:
        WeightError: if the shard sizes do not sum to ``out_features``.
        PatternError: if M does not divide ``in_features``.

    Shapes: ``[..., in]`` → ``[..., out]``, in autocast's dtype if enabled, else the input's.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        spec: PackedSpec | None = None,
        where: str = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec or PackedSpec(), where)
        check_shard_sizes(self.spec.shard_sizes, out_features, where)
        self.in_features, self.out_features = in_features, out_features
        self._add_weight("weight", out_features, in_features, device=device)
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_buffer("bias", empty)

    def shard_sizes_of(self, name: str) -> tuple[int, ...]:
        return self.spec.shard_sizes

    def prepare_weight(self, ternary: Tensor, scale: Tensor) -> TernaryWeight:
        stored = self.get_buffer("weight") if self.spec.storage == "two-bit" else None
        return prepare(ternary, scale, stored)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.prepared("weight"), self.bias)

    def from_integers(
        self, x_q: Tensor, x_scale: Tensor, dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        """The result, in ``dtype``, of activations that are quantized already.

        Args:
            x_q: int8 ``[..., in]``.
            x_scale: float32 ``[..., 1]``.
            residual: ``[..., out]`` of ``dtype``, added to the rounded result.
        """
        return integer_linear(x_q, x_scale, self.prepared("weight"), self.bias, dtype, residual)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return (
            f"{shape}, bias={self.bias is not None}, pattern={self.spec.pattern}, "
            f"storage={self.spec.storage}"
        )
