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
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear, output_dtype, quantized

MLP = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""transformers' classes whose forward is known to be down(act(gate(x))·up(x))."""
SILU = ("SiLU", "SiLUActivation")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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

    Takes over everything the module holds, hooks included, under the same names. Its layers become
    one function on an NVIDIA GPU where results are bf16, activations int8 and products dense, and
    no layer has a bias, a masked gradient, several γ or a hook; else they run one by one.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(mlp.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not (_on_gpu_in_bf16(x) and _joins(gate) and _joins(up) and _joins(down)):
            result: Tensor = down(self.act_fn(gate(x)) * up(x))  # type: ignore[operator]
            return result
        layers: Any = (gate, up, down)
        if not torch.compiler.is_compiling():
            for layer in layers:
                layer.refresh()
        return GatedProducts.apply(
            x,
            *[layer.weight for layer in layers],
            *[layer.ternary for layer in layers],
            *[row_scale(layer.scale, (), layer.out_features) for layer in layers],
            torch.bfloat16,
            gate.method.backward == "fp8",  # type: ignore[union-attr]
        )


def join_gated_mlps(model: nn.Module) -> int:
    """Let the gated MLPs of a converted model train as one function each, in place.

    Returns:
        How many there are: of known classes with SwiGLU and three converted layers of one method.
    """
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in MLP and _is_converted(child):
                setattr(module, name, GatedMLP(child))
                count += 1
    return count


def _is_converted(mlp: nn.Module) -> bool:
    if type(getattr(mlp, "act_fn", None)).__name__ not in SILU:
        return False
    layers = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    methods = [layer.method for layer in layers if isinstance(layer, SparseBitLinear)]
    return len(methods) == 3 and methods[0] == methods[1] == methods[2]


def _on_gpu_in_bf16(x: Tensor) -> bool:
    return runs_triton(x) and output_dtype(x) == torch.bfloat16


def _joins(layer: Any) -> bool:
    return (
        type(layer) is SparseBitLinear
        and layer.bias is None
        and layer.kept is None
        and layer.structured is None
        and len(layer.segments) < 2
        and layer.method.activation_bits == 8
        and not any(getattr(layer, hooks) for hooks in HOOKS)
    )
