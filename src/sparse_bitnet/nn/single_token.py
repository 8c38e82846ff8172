"""Decoder layers whose single-token step is one call, on a CPU.

Generating token by token, a layer of transformers runs some thirty PyTorch operators of a few
microseconds around four products; here all of it is one call of the compiled library, over the
same weights and the same key-value cache. Whatever the call does not serve takes the layer's own
forward: prompts, batches, masks, other caches, gradients, compilation.

Results are those of the separate modules up to the order of float sums: values are rounded to the
model's dtype where the modules round, but probabilities of attention are kept in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.native.layer import HEAD_MULTIPLE, LARGEST_HEAD, LayerCall
from sparse_bitnet.kernels.weight import TernaryWeight
from sparse_bitnet.nn.fuse import FusedMLP, Part
from sparse_bitnet.nn.packed_linear import PackedLinear

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""transformers' classes whose forward is known to be the one that native/native.cpp computes."""
SPARE_TOKENS = 256
"""Room that a cache gets beyond its tokens, at least: it then grows without being copied."""


def step_in_one_call(model: nn.Module) -> int:
    """Let the fused, packed decoder layers of a model take single tokens in one call, in place.

    Returns:
        How many layers do.
    """
    layers = [
        module
        for module in model.modules()
        if type(module).__name__ in LAYERS and linears_of(module) is not None
    ]
    for layer in layers:
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (_SingleToken, kind), {})
        vars(layer)["_step"] = _Step()
    return len(layers)


def linears_of(layer: Any) -> list[PackedLinear] | None:
    """q/k/v joined, o, gate/up joined, and down; None if the layer is not fused and packed so."""
    attention, mlp = layer.self_attn, layer.mlp
    if not isinstance(attention.q_proj, Part) or not isinstance(mlp, FusedMLP):
        return None
    joined = (attention.q_proj.shared.linear, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    linears = [linear for linear in joined if isinstance(linear, PackedLinear)]
    fits = attention.head_dim % HEAD_MULTIPLE == 0 and attention.head_dim <= LARGEST_HEAD
    if len(linears) < len(joined) or not fits:
        return None
    return linears if all(one.spec.activation_bits == 8 for one in linears) else None


class _Step:
    """The prepared call of a layer, and what it was prepared from. A copy begins empty.

    Attributes:
        linears, norms: the layer's modules, looked up once, since that takes longer than their use.
        made_from: weights, parameters, threads, path and dtype that ``call`` was prepared from.
        call: None if the layer does not serve them.
    """

    def __init__(self) -> None:
        self.linears: list[PackedLinear] = []
        self.norms: list[Any] = []
        self.made_from: tuple[Any, ...] = ()
        self.call: LayerCall | None = None

    def look_up(self, layer: Any) -> None:
        """Find the modules if they are not known."""
        if not self.linears:
            attention = layer.self_attn
            head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
            self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
            self.norms += [norm for norm in head_norms if norm is not None]
            self.linears = linears_of(layer) or []

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Step:
        return _Step()


class _SingleToken:
    """Put in front of a layer's class: its forward, where that is not one token on a CPU."""

    _step: _Step

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """As the class behind."""
        if (
            hidden_states.shape[:2] == (1, 1)
            and attention_mask is None
            and position_embeddings is not None
            and not options.get("output_attentions")
        ):
            cache = _cache_of(self, past_key_values)
            call = None if cache is None else _call_of(self, hidden_states, *position_embeddings)
            if cache is not None and call is not None:
                return _run(call, hidden_states, *position_embeddings, cache)
        result: Tensor = super().forward(  # type: ignore[misc]
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **options,
        )
        return result


def _cache_of(layer: Any, past_key_values: Any) -> DynamicLayer | None:
    """The layer's cache, if it is of the kind that grows and is for one sequence."""
    layers = getattr(past_key_values, "layers", None)
    index = layer.self_attn.layer_idx
    if layers is None or index >= len(layers) or type(layers[index]) is not DynamicLayer:
        return None
    cache = layers[index]
    ready = cache.is_initialized and cache.keys.dim() == 4 and cache.keys.shape[0] == 1
    return cache if ready else None


def _call_of(layer: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> LayerCall | None:
    """The layer's prepared call; None if it does not serve such a token."""
    if (
        x.device.type != "cpu"
        or x.dtype not in native.TYPES
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or (torch.is_grad_enabled() and x.requires_grad)
        or not (x.is_contiguous() and cosine.is_contiguous() and sine.is_contiguous())
        or not cosine.dtype == sine.dtype == x.dtype
        or not cosine.numel() == sine.numel() == layer.self_attn.head_dim
    ):
        return None
    step: _Step = layer._step
    step.look_up(layer)
    weights: list[TernaryWeight] = [linear.layout("weight") for linear in step.linears]
    parameters = [norm.weight for norm in step.norms]
    made_from = (*weights, *parameters, torch.get_num_threads(), native.path(), x.dtype)
    if len(made_from) == len(step.made_from) and all(
        a is b for a, b in zip(made_from, step.made_from, strict=True)
    ):
        return step.call
    step.made_from, step.call = made_from, None
    if all(weight.packed is not None for weight in weights) and all(
        one.dtype == x.dtype and one.device == x.device and one.is_contiguous()
        for one in parameters
    ):
        attention, norms = layer.self_attn, step.norms
        step.call = LayerCall(
            [
                (weight, None if linear.bias is None else linear.bias.contiguous())
                for weight, linear in zip(weights, step.linears, strict=True)
            ],
            (norms[0].weight, norms[1].weight),
            (norms[0].variance_epsilon, norms[1].variance_epsilon),
            (norms[2].weight, norms[3].weight) if len(norms) > 2 else None,
            norms[2].variance_epsilon if len(norms) > 2 else 0.0,
            (attention.config.num_attention_heads, attention.config.num_key_value_heads),
            attention.head_dim,
            attention.scaling,
            x.dtype,
        )
    return step.call


def _run(call: LayerCall, x: Tensor, cosine: Tensor, sine: Tensor, cache: Any) -> Tensor:
    length = cache.keys.shape[-2]
    buffers: tuple[Tensor, Tensor] | None = getattr(cache, "sparse_bitnet_buffers", None)
    if (
        buffers is None
        or cache.keys.data_ptr() != buffers[0].data_ptr()  # somebody else has grown or sorted it
        or cache.values.data_ptr() != buffers[1].data_ptr()
        or length >= buffers[0].shape[-2]
        or cache.keys.dtype != buffers[0].dtype
    ):
        buffers = (_with_room(cache.keys, x.dtype), _with_room(cache.values, x.dtype))
        cache.sparse_bitnet_buffers = buffers
    y = call(x, cosine, sine, *buffers, length)
    cache.keys, cache.values = (buffer[:, :, : length + 1] for buffer in buffers)
    return y


def _with_room(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``[1, heads, tokens, head_dim]`` in the front of a longer one."""
    batch, heads, length, width = tensor.shape
    room = max(SPARE_TOKENS, length // 2)
    longer = torch.empty(batch, heads, length + room, width, dtype=dtype)
    longer[:, :, :length] = tensor
    return longer
