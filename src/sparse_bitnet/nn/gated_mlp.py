"""A gated MLP in training: one autograd function over its three products.

    forward    x → int8 ─┬─ gate ─┬─ silu(gate)·up → int8 ── down ── y
                         └─ up ───┘
    backward   dY ── down ── dh ── d gate, d up (with fp8: as e4m3) ──┬─ gate ─┬─ dX
                                                                      └─ up ───┘

Module by module, silu(gate)·up is written in floating point to be read again by the quantization
in front of ``down_proj``, and with the fp8 backward d gate and d up are by theirs. These are the
widest activations of a model. Here each is one pass (:mod:`sparse_bitnet.kernels.swiglu`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_bitnet.core import row_scale
from sparse_bitnet.kernels import swiglu, ternary_matmul
from sparse_bitnet.kernels.backward.gated import Kept, Layer, gated_gradients
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.nn.calls import is_called_plainly
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear, output_dtype, quantized

MLP = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""transformers' classes whose forward is known to be down(act(gate(x))·up(x))."""
SILU = ("SiLU", "SiLUActivation")
SOURCE = "transformers.models."
"""Where such a class's forward has to come from: others use the names too, and may do more."""


class GatedProducts(torch.autograd.Function):
    """Y = down(silu(gate(X))·up(X)) of ternary layers, each of which learns as in ``BitProduct``.

    Kept for backward are the integers of both quantizations, and gate and up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
        gate_ternary: Tensor,
        up_ternary: Tensor,
        down_ternary: Tensor,
        gate_scale: Tensor,
        up_scale: Tensor,
        down_scale: Tensor,
        out_dtype: torch.dtype,
        fp8: bool,
    ) -> Tensor:
        x_q, x_scale = quantized(x, 8)
        gate = ternary_matmul(x_q, x_scale, gate_ternary, gate_scale, None, out_dtype)
        up = ternary_matmul(x_q, x_scale, up_ternary, up_scale, None, out_dtype)
        h_q, h_scale = swiglu.quantize(gate, up)
        weights = gate_ternary, up_ternary, down_ternary, gate_scale, up_scale, down_scale
        ctx.save_for_backward(x_q, x_scale, gate, up, h_q, h_scale, *weights)
        ctx.x_dtype, ctx.fp8 = x.dtype, fp8
        ctx.dtypes = gate_weight.dtype, up_weight.dtype, down_weight.dtype
        return ternary_matmul(h_q, h_scale, down_ternary, down_scale, None, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        x_q, x_scale, gate, up, h_q, h_scale, *weights = ctx.saved_tensors
        dx, *dw = gated_gradients(
            dy,
            Kept(x_q, x_scale, gate, up, h_q, h_scale),
            Layer(weights[0], weights[3], ctx.dtypes[0]),
            Layer(weights[1], weights[4], ctx.dtypes[1]),
            Layer(weights[2], weights[5], ctx.dtypes[2]),
            use_fp8=ctx.fp8,
            needs=tuple(ctx.needs_input_grad[:4]),
            x_dtype=ctx.x_dtype,
        )
        return dx, *dw, *[None] * 8


class GatedMLP(nn.Module):
    """A gated MLP of transformers with converted layers: ``[..., hidden]`` → ``[..., hidden]``.

    Only the class of a module becomes this one: it holds what it held, hooks included. Its layers
    become one function on an NVIDIA GPU where results are bf16, activations int8 and products
    dense, no layer has a bias, a masked gradient or several γ, and a call of each part is its
    forward and nothing else (no hooks); else they run one by one.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        served = _on_gpu_in_bf16(x) and _is_silu(self.act_fn)
        if not (served and _joins(gate) and _joins(up) and _joins(down)):
            result: Tensor = down(self.act_fn(gate(x)) * up(x))
            return result
        layers: Any = (gate, up, down)
        derived = [layer.derived() for layer in layers]
        return GatedProducts.apply(
            x,
            *[layer.weight for layer in layers],
            *[ternary for ternary, _, _ in derived],
            *[row_scale(d[1], (), n.out_features) for d, n in zip(derived, layers, strict=True)],
            torch.bfloat16,
            gate.method.backward == "fp8",
        )


def join_gated_mlps(model: nn.Module) -> int:
    """Let the gated MLPs of a converted model train as one function each, in place.

    Returns:
        How many there are: of known classes with SwiGLU and three converted layers of one method.
    """
    found = [m for m in model.modules() if is_known(m) and _is_converted(m)]
    for module in found:
        module.__class__ = GatedMLP
    return len(found)


def is_known(module: nn.Module) -> bool:
    """Whether the forward of the module's class is down(act(gate(x))·up(x))."""
    kind = type(module)
    return kind.__name__ in MLP and kind.forward.__module__.startswith(SOURCE)


def _is_converted(mlp: nn.Module) -> bool:
    if not _is_silu(mlp.act_fn):
        return False
    layers = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    methods = [layer.method for layer in layers if isinstance(layer, SparseBitLinear)]
    return len(methods) == 3 and methods[0] == methods[1] == methods[2]


def _is_silu(function: Any) -> bool:
    return type(function).__name__ in SILU and is_called_plainly(function)


def _on_gpu_in_bf16(x: Tensor) -> bool:
    return runs_triton(x) and output_dtype(x) == torch.bfloat16


def _joins(layer: Any) -> bool:
    return (
        type(layer) is SparseBitLinear
        and layer.bias is None
        and layer.method.gradient == "dense"
        and layer.group is None
        and len(layer.segments) < 2
        and layer.method.activation_bits == 8
        and is_called_plainly(layer)
    )
