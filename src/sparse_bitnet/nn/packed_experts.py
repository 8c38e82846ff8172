"""Mixture-of-experts weights that run from packed ternary storage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_bitnet.kernels.registry import TernaryWeight, prepare
from sparse_bitnet.nn.experts import route
from sparse_bitnet.nn.packed_module import PackedModule, PackedSpec


class PackedExperts(PackedModule):
    """The inference form of ``SparseBitExperts``: the same arithmetic, so the same outputs.

    Buffers, which are also its state dict: ``gate_up_proj`` (uint8 ``[E, 2I, bytes]``),
    ``gate_up_proj_scale`` (float32 ``[E, 2]``, of gate and of up), ``down_proj`` (uint8
    ``[E, H, bytes]``) and ``down_proj_scale`` (float32 ``[E, 1]``).

    Args:
        num_experts, hidden_dim, intermediate_dim: E, H and I.
        act_fn: applied to the gate.
        spec: format, pattern, activation bits.
        where: the module's name, for error messages.
        device: where to make the (empty) buffers.

    Raises:
        PatternError: if M does not divide the hidden or the intermediate size.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        intermediate_dim: int,
        act_fn: Callable[[Tensor], Tensor],
        *,
        spec: PackedSpec | None = None,
        where: str = "experts",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(spec or PackedSpec(), where)
        self.num_experts, self.hidden_dim = num_experts, hidden_dim
        self.intermediate_dim, self.act_fn = intermediate_dim, act_fn
        self._add_weight(
            "gate_up_proj", num_experts, 2 * intermediate_dim, hidden_dim, device=device
        )
        self._add_weight("down_proj", num_experts, hidden_dim, intermediate_dim, device=device)

    def shard_sizes_of(self, name: str) -> tuple[int, ...]:
        return (self.intermediate_dim,) * 2 if name == "gate_up_proj" else ()

    def prepare_weight(self, ternary: Tensor, scale: Tensor) -> list[TernaryWeight]:
        return [prepare(one, rows) for one, rows in zip(ternary, scale, strict=True)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def expert(index: int, x: Tensor) -> Tensor:
            gate_up, down = (self.prepared(name)[index] for name in ("gate_up_proj", "down_proj"))
            gate, up = self.product(x, gate_up, None).chunk(2, dim=-1)
            return self.product(self.act_fn(gate) * up, down, None)

        return route(hidden_states, top_k_index, top_k_weights, self.num_experts, expert)

    def extra_repr(self) -> str:
        shape = f"experts={self.num_experts}, hidden={self.hidden_dim}"
        return (
            f"{shape}, intermediate={self.intermediate_dim}, pattern={self.spec.pattern}, "
            f"storage={self.spec.storage}"
        )
