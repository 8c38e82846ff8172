"""Decoder layers that generate on a GPU: residual sum, norm and quantization in one kernel.

Compiled, a decoder layer of few tokens is a chain of short kernels, and what a compiler makes of a
norm lets the next kernel begin only when it has nearly ended. The kernel of this package that takes
the residual sum along is shorter, and the product behind it fetches its weights meanwhile
(``kernels/early.py``). What it makes are integers, and they go through transformers' own attention
in the place of its input, to the projections, which alone read them. The last product of a layer
adds the residual stream to what it writes.

Prompts, other layers and eager mode take transformers' own forward, and so do all layers while
there is a hook in one.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.kernels import dispatch
from sparse_bitnet.kernels.quantize_activations import add_norm_quantize, quantize_fused
from sparse_bitnet.nn.calls import runs_plainly_inside
from sparse_bitnet.nn.packed_linear import Integers
from sparse_bitnet.nn.single_token import LAYERS, joined_linears

_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def quantize_in_norms(model: nn.Module) -> int:
    """Let the fused, packed decoder layers of a model run so where they are compiled, in place.

    Returns:
        How many layers do.
    """
    layers = [
        layer
        for layer in model.modules()
        if type(layer).__name__ in LAYERS and joined_linears(layer) is not None
    ]
    for layer in layers:
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (_FewTokens, kind), {})
        _layers.add(layer)
        projection: Any = layer.get_submodule("self_attn.o_proj")
        projection.joins = False  # attention is a kernel of ours there, or PyTorch's
    return len(layers)


@torch.compiler.assume_constant_result
def _may_pass_over() -> bool:
    """Whether nobody wants to see what goes into the modules of a layer, or out of them."""
    return runs_plainly_inside(_layers)


class _FewTokens:
    """Put in front of a layer's class: its forward for few tokens in a compiled graph."""

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        _layers.add(self)

    def forward(self: Any, hidden_states: Tensor, *positional: Any, **options: Any) -> Tensor:
        """As the class behind."""
        first, second = self.input_layernorm, self.post_attention_layernorm
        weights = [linear.layout("weight") for linear in joined_linears(self) or []]
        if (
            positional
            or not weights
            or not first.weight.dtype == second.weight.dtype == hidden_states.dtype
            or torch.is_autocast_enabled(hidden_states.device.type)
            or not dispatch.takes_integers(weights, hidden_states)
            or not _may_pass_over()
        ):
            result: Tensor = super().forward(hidden_states, *positional, **options)  # type: ignore[misc]
            return result
        dtype = hidden_states.dtype
        options = {"attention_mask": None, "position_embeddings": None} | options
        x_q, x_scale = quantize_fused(hidden_states, first.weight, first.variance_epsilon)
        mixed, _ = self.self_attn(hidden_states=Integers(x_q, x_scale, dtype), **options)
        total, x_q, x_scale = add_norm_quantize(
            hidden_states, mixed, second.weight, second.variance_epsilon
        )
        y: Tensor = self.mlp(Integers(x_q, x_scale, dtype), total)
        return y
