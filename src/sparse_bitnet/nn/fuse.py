"""Linears that read the same input become one product, for inference.

    q_proj ─┐                      gate_proj ─┐
    k_proj ─┼─ one [q + k + v, in]            ├─ one [gate + up, in] ─ SwiGLU ─ down_proj
    v_proj ─┘                      up_proj   ─┘

One activation quantization serves all of them, and one large product keeps a GPU busier than
three small ones. Every logical matrix keeps its own γ: compute layouts carry a scale for each row.

The attention of transformers calls its three projections one after another with the same tensor.
The first of them multiplies for all three and the others take their part, so no attention code of
any architecture is replaced. A gated MLP is replaced as a whole: its SwiGLU product is then part of
the quantization in front of ``down_proj``.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bitnet.core import ConfigError
from sparse_bitnet.kernels.dispatch import gated_mlp, integer_mlp
from sparse_bitnet.nn.calls import is_called_plainly, runs_plainly_inside
from sparse_bitnet.nn.gated_mlp import SILU, GatedMLP, is_known
from sparse_bitnet.nn.packed_linear import Integers, PackedLinear
from sparse_bitnet.nn.sparse_bit_linear import output_dtype

ATTENTION = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
"""Classes whose forward is known to be as the module's description says."""


def fuse(model: nn.Module) -> int:
    """Join q, k and v, and gate and up, of every decoder layer in place.

    For a model that is about to run: packed, or (so that comparisons are fair) plain ``nn.Linear``.
    Its state dict would no longer be that of the architecture and is refused: save before.

    Returns:
        How many products were saved. Layers of other architectures, with mixed kinds of linears or
        with experts stay as they are.
    """
    saved = 0
    for module in list(model.modules()):
        if type(module).__name__ in ATTENTION:
            names = ("q_proj", "k_proj", "v_proj")
            linears = [module.get_submodule(name) for name in names]
            if _can_join(linears):
                shared = SharedProduct(join(linears), [_rows(linear) for linear in linears])
                for index, name in enumerate(names):
                    setattr(module, name, Part(shared, index))
                saved += 2
        for name, child in list(module.named_children()):
            if _is_gated_mlp(child):
                setattr(module, name, FusedMLP(child))
                saved += 1
    return saved


class SharedProduct:
    """A product that several linears of one input share, and its last result.

    Input and result are kept in one attribute, read and written at once: another thread's forward
    may put its own there, which costs a product more and never gives wrong numbers.
    """

    def __init__(self, linear: nn.Module, sizes: list[int]) -> None:
        self.linear, self.sizes = linear, sizes
        self.last: tuple[Tensor | Integers, tuple[Tensor, ...]] | None = None


class Part(nn.Module):
    """One of several linears of the same input: ``[..., in]`` → ``[..., out]``.

    Args:
        shared: what the parts share.
        index: which part this is; part 0 owns the parameters and buffers.
    """

    def __init__(self, shared: SharedProduct, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.in_features, self.out_features = _columns(shared.linear), shared.sizes[index]
        if index == 0:
            self.joined = shared.linear
            self.register_state_dict_pre_hook(_refuse_to_save)

    def forward(self, x: Tensor | Integers) -> Tensor:
        shared = self.shared
        last = shared.last
        # The first part multiplies anew: the same tensor may have been written to since.
        if self.index == 0 or last is None or last[0] is not x:
            last = (x, shared.linear(x).split(shared.sizes, dim=-1))
        # After the last part nothing is kept: activations must not outlive the layer.
        shared.last = None if self.index == len(shared.sizes) - 1 else last
        return last[1][self.index]

    def extra_repr(self) -> str:
        return f"part {self.index} of {len(self.shared.sizes)}, out_features={self.out_features}"


@torch.compiler.assume_constant_result
def _products_called_plainly() -> bool:
    """Whether no product of any fused MLP has a hook."""
    return runs_plainly_inside(_mlps)


class FusedMLP(nn.Module):
    """A gated MLP of transformers, gate and up joined: ``[..., hidden]`` → ``[..., hidden]``.

    A residual, if one is given, is added to the result.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = join([mlp.get_submodule("gate_proj"), mlp.get_submodule("up_proj")])
        self.down_proj = mlp.get_submodule("down_proj")
        self.register_state_dict_pre_hook(_refuse_to_save)
        _mlps.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _mlps.add(self)

    def forward(self, x: Tensor | Integers, residual: Tensor | None = None) -> Tensor:
        first, second = self.gate_up_proj, self.down_proj
        if torch.compiler.is_compiling():
            plain = _products_called_plainly()
        else:
            plain = is_called_plainly(first) and is_called_plainly(second)
        if plain and _runs_fused(first) and _runs_fused(second):
            both = first.layout("weight"), second.layout("weight")  # type: ignore[operator]
            if isinstance(x, Integers):
                return integer_mlp(x.values, x.scale, *both, x.dtype, residual)
            y = gated_mlp(x, *both, output_dtype(x))
        else:
            gate, up = first(x).chunk(2, dim=-1)
            y = second(F.silu(gate) * up)
        return y if residual is None else residual + y


_mlps: weakref.WeakSet[FusedMLP] = weakref.WeakSet()


def _refuse_to_save(_module: nn.Module, prefix: str, _keep_vars: bool) -> None:
    raise ConfigError(
        f"{prefix.removesuffix('.') or 'model'}: its layers were joined to run, and nothing could "
        "load the weights under their new names; save before fuse or make_ready, or load again"
    )


def join(linears: list[nn.Module]) -> nn.Module:
    """One linear whose output is that of the given ones side by side.

    Raises:
        ConfigError: if they are of different kinds, or of different inputs.
    """
    if not _can_join(linears):
        told = ", ".join(f"{type(linear).__name__} {linear.extra_repr()}" for linear in linears)
        raise ConfigError(f"these layers cannot be joined: {told}")
    out = sum(_rows(linear) for linear in linears)
    first = linears[0]
    if isinstance(first, PackedLinear):
        parts = [linear for linear in linears if isinstance(linear, PackedLinear)]
        segments = sum((part.spec.segments or (part.out_features,) for part in parts), ())
        joined: nn.Module = PackedLinear(
            first.in_features,
            out,
            False,
            spec=replace(first.spec, segments=segments),
            where=first.where,
            device="meta",
        )
        for name in ("weight", "weight_scale"):
            joined._buffers[name] = torch.cat([part.get_buffer(name) for part in parts])
        joined._buffers["bias"] = _joined_bias(linears)
        return joined
    assert isinstance(first, nn.Linear)
    joined = nn.Linear(first.in_features, out, bias=False, device="meta")
    weights = [linear.weight for linear in linears if isinstance(linear, nn.Linear)]
    joined.weight = nn.Parameter(torch.cat(weights).detach(), requires_grad=False)
    bias = _joined_bias(linears)
    joined.register_parameter(
        "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
    )
    return joined


def _joined_bias(linears: list[nn.Module]) -> Tensor | None:
    """Biases side by side, zeros where a layer has none; None if no layer has one."""
    biases = [getattr(linear, "bias", None) for linear in linears]
    given = [bias for bias in biases if isinstance(bias, Tensor)]
    if not given:
        return None
    return torch.cat(
        [
            bias.detach() if isinstance(bias, Tensor) else given[0].new_zeros(_rows(linear))
            for bias, linear in zip(biases, linears, strict=True)
        ]
    )


def _can_join(linears: list[nn.Module]) -> bool:
    if all(isinstance(linear, PackedLinear) for linear in linears):
        alike = {(_columns(one), replace(one.spec, segments=())) for one in linears}  # type: ignore[type-var]
        return len(alike) == 1
    plain = all(type(linear) is nn.Linear for linear in linears)
    return plain and len({_columns(linear) for linear in linears}) == 1


def _is_gated_mlp(module: nn.Module) -> bool:
    if not (isinstance(module, GatedMLP) or is_known(module)):
        return False
    if type(module.act_fn).__name__ not in SILU:
        return False
    return _can_join([module.get_submodule("gate_proj"), module.get_submodule("up_proj")])


def _runs_fused(linear: nn.Module) -> bool:
    return (
        isinstance(linear, PackedLinear)
        and linear.bias is None
        and linear.spec.activation_bits == 8
    )


def _rows(linear: nn.Module) -> int:
    assert isinstance(linear.out_features, int)
    return linear.out_features


def _columns(linear: nn.Module) -> int:
    assert isinstance(linear.in_features, int)
    return linear.in_features
