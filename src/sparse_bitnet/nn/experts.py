"""Mixture-of-experts modules: 3-D weights, one γ for each logical matrix of each expert.

transformers 5 keeps all experts of a layer in two parameters, ``gate_up_proj`` ``[E, 2I, H]`` and
``down_proj`` ``[E, H, I]``, and routes tokens through them in the module that owns them. The
modules here keep those names and shapes and replace the two products.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bitnet.core import DENSE, Method, Pattern, row_scale
from sparse_bitnet.nn.derived import DerivedModule
from sparse_bitnet.nn.sparse_bit_linear import ternary_product
from sparse_bitnet.nn.sparse_linear import masked_weight

# What transformers calls act_fn(gate) * up; a class with another gate brings its own function.
PLAIN_GATE = "_default_apply_gate"


def why_not_experts(module: nn.Module) -> str | None:
    """None for a module that this file can take over, else what is different about it."""
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"gate_up_proj", "down_proj"}:
        return f"its parameters are {sorted(parameters)}, not gate_up_proj and down_proj alone"
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    if gate_up.dim() != 3 or down.dim() != 3:
        return "gate_up_proj and down_proj do not have three dimensions"
    experts, hidden, inner = down.shape
    if gate_up.shape != (experts, 2 * inner, hidden):
        return (
            f"gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)} are not "
            "[E, 2I, H] and [E, H, I]"
        )
    if not callable(getattr(module, "act_fn", None)):
        return "it has no act_fn"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != PLAIN_GATE:
        return "its gate is not act_fn(gate) * up"
    if not getattr(module, "is_concatenated", True):
        return "it interleaves the rows of gate and up"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalizes each expert's output"
    return None


def route(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: int,
    expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Sum of the chosen experts' outputs, weighted, token by token.

    Args:
        hidden: ``[tokens, H]``.
        top_k_index: ``[tokens, k]``; an index of ``experts`` means no expert.
        top_k_weights: ``[tokens, k]``.
        experts: how many there are.
        expert: ``(index, [n, H]) -> [n, H]``.
    """
    result = torch.zeros_like(hidden)
    for index in top_k_index.unique().tolist():
        if index >= experts:
            continue
        token, place = torch.where(top_k_index == index)
        output = expert(index, hidden[token]) * top_k_weights[token, place, None]
        result.index_add_(0, token, output.to(result.dtype))
    return result


class _Experts(DerivedModule):
    """Base of both kinds: the parameters taken over, and the routing."""

    act_fn: Callable[[Tensor], Tensor]

    def __init__(
        self, experts: nn.Module, pattern: Pattern = DENSE, method: Method | None = None
    ) -> None:
        super().__init__()
        taken: Any = experts
        self.gate_up_proj: nn.Parameter = taken.gate_up_proj
        self.down_proj: nn.Parameter = taken.down_proj
        self.act_fn = taken.act_fn
        self.num_experts, self.hidden_dim, self.intermediate_dim = self.down_proj.shape
        self._configure(pattern, method)
        self.train(experts.training)

    def master_parameters(self) -> dict[str, nn.Parameter]:
        return {"gate_up_proj": self.gate_up_proj, "down_proj": self.down_proj}

    def shard_sizes_of(self, name: str) -> tuple[int, ...]:
        return (self.intermediate_dim,) * 2 if name == "gate_up_proj" else ()

    @abstractmethod
    def _products(self, name: str) -> Callable[[int, Tensor], Tensor]:
        """``(expert, [n, in]) → [n, out]`` with that parameter.

        One unbind instead of an index an expert: its backward stacks the gradients once.
        """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate_up, down = self._products("gate_up_proj"), self._products("down_proj")

        def expert(index: int, x: Tensor) -> Tensor:
            gate, up = gate_up(index, x).chunk(2, dim=-1)
            return down(index, self.act_fn(gate) * up)

        return route(hidden_states, top_k_index, top_k_weights, self.num_experts, expert)

    def extra_repr(self) -> str:
        shape = f"experts={self.num_experts}, hidden={self.hidden_dim}"
        return f"{shape}, intermediate={self.intermediate_dim}, pattern={self.pattern}"


class SparseBitExperts(_Experts):
    """Experts with ternary N:M weights and integer activations; γ per expert, gate, up and down.

    Parameters keep the names and shapes of transformers' experts, and are all that it holds.

    Raises:
        PatternError: if M does not divide the hidden or the intermediate size.
    """

    is_ternary = True

    def _products(self, name: str) -> Callable[[int, Tensor], Tensor]:
        master = self.master_parameters()[name]
        ternary, scale, kept = self.derived(name)
        assert ternary is not None and scale is not None
        rows = row_scale(scale, self.shard_sizes_of(name), master.shape[-2])
        masters = master.unbind(0)

        def product(index: int, x: Tensor) -> Tensor:
            mask = None if kept is None else kept[index]
            weights = masters[index], None, ternary[index], rows[index], mask
            return ternary_product(self, x, *weights, scale.shape[-1] < 2)

        return product


class SparseExperts(_Experts):
    """The BF16 baseline of :class:`SparseBitExperts`: masked, not quantized."""

    is_ternary = False

    def _products(self, name: str) -> Callable[[int, Tensor], Tensor]:
        masters = masked_weight(self, self.master_parameters()[name], *self.derived(name)).unbind(0)
        return lambda index, x: F.linear(x, masters[index].to(x.dtype))
