"""All decoder layers of a model in one call for a single token, on a CPU.

Generating token by token, a layer of transformers runs some thirty PyTorch operators of a few
microseconds around four products, and Python between them, with caches that the weights have just
swept. Here the first layer takes the token through all of them in one call of the compiled library,
over the same weights and the same key-value cache; the other layers see that it has been and hand
it on. Whatever the call does not serve takes the layers' own forward: prompts, batches, masks,
other caches, gradients, hooks, compilation.

Results are those of the separate modules up to the order of float sums: values are rounded to the
model's dtype where the modules round, but probabilities of attention are kept in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.native.layer import (
    HEAD_MULTIPLE,
    LARGEST_HEAD,
    LayerCall,
    StackCall,
)
from sparse_bitnet.nn.fuse import FusedMLP, Part
from sparse_bitnet.nn.packed_linear import PackedLinear

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""transformers' classes whose forward is known to be the one that native/native.cpp computes."""
SPARE_TOKENS = 256
"""Room that a cache gets beyond its tokens, at least: it then grows without being copied."""
DONE = "_sparse_bitnet_done"
"""Attribute of a hidden state that has been through the stack it names."""


def step_in_one_call(model: nn.Module) -> int:
    """Let the fused, packed decoder layers of a model take single tokens in one call, in place.

    Returns:
        How many layers do.
    """
    served = 0
    for layers in model.modules():
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        if all(type(one).__name__ in LAYERS and linears_of(one) is not None for one in layers):
            stack = Stack(list(layers))
            for index, layer in enumerate(layers):
                kind = type(layer)
                layer.__class__ = type(kind.__name__, (_SingleToken, kind), {})
                vars(layer)["_place"] = _Place(stack, index)
            served += len(layers)
    return served


def joined_linears(layer: Any) -> list[PackedLinear] | None:
    """q/k/v joined, o, gate/up joined, and down; None if the layer is not fused and packed so."""
    attention, mlp = layer.self_attn, layer.mlp
    if not isinstance(attention.q_proj, Part) or not isinstance(mlp, FusedMLP):
        return None
    joined = (attention.q_proj.shared.linear, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    linears = [linear for linear in joined if isinstance(linear, PackedLinear)]
    if len(linears) < len(joined) or any(one.spec.activation_bits != 8 for one in linears):
        return None
    return linears


def linears_of(layer: Any) -> list[PackedLinear] | None:
    """:func:`joined_linears`; None if the compiled call does not compute such a layer.

    It knows some head dimensions, and no attention that looks back over a window only.
    """
    attention = layer.self_attn
    of_config = getattr(attention.config, "sliding_window", None)
    window = getattr(attention, "sliding_window", of_config)
    fits = attention.head_dim % HEAD_MULTIPLE == 0 and attention.head_dim <= LARGEST_HEAD
    return joined_linears(layer) if fits and window is None else None


class _Place:
    """A layer's place in a stack. A copy of the layer has none, and runs by itself."""

    def __init__(self, stack: Stack | None, index: int) -> None:
        self.stack, self.index = stack, index

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Place:
        return _Place(None, self.index)


class _SingleToken:
    """Put in front of a layer's class: its forward, where that is not one token on a CPU."""

    _place: _Place

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
        stack, index = self._place.stack, self._place.index
        if stack is not None:
            if index and getattr(hidden_states, DONE, None) is stack:
                return hidden_states
            if (
                not index
                and hidden_states.shape[:2] == (1, 1)
                and attention_mask is None
                and position_embeddings is not None
            ):
                y = stack.run(hidden_states, *position_embeddings, past_key_values)
                if y is not None:
                    return y
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


class Stack:
    """The decoder layers of a model, and their prepared call.

    Attributes:
        call: None if there is none yet, or if the layers as they are cannot be served.
    """

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._linears = [linears_of(layer) or [] for layer in layers]
        self._norms = [_norms_of(layer) for layer in layers]
        self._config = layers[0].self_attn.config
        modules = [module for layer in layers for module in layer.modules()]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._made_from: list[Any] = []
        self.call: StackCall | None = None

    def run(self, x: Tensor, cosine: Tensor, sine: Tensor, past_key_values: Any) -> Tensor | None:
        """One token through all layers; None if they have to do it themselves.

        Args:
            x: ``[1, 1, hidden]``.
            cosine, sine: of its position.
            past_key_values: transformers' cache; grows by the token.
        """
        if (
            x.device.type != "cpu"
            or x.dtype not in native.TYPES
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and x.requires_grad)
            or not (x.is_contiguous() and cosine.is_contiguous() and sine.is_contiguous())
            or not cosine.dtype == sine.dtype == x.dtype
            or not cosine.numel() == sine.numel() == self._layers[0].self_attn.head_dim
            or self._config.num_hidden_layers != len(self._layers)
            or any(self._hooks)
        ):
            return None
        caches = getattr(past_key_values, "layers", None)
        if caches is None or len(caches) != len(self._layers):
            return None
        for cache in caches:
            if type(cache) is not DynamicLayer or not cache.is_initialized:
                return None
        shape = caches[0].keys.shape
        if len(shape) != 4 or shape[0] != 1 or any(one.keys.shape != shape for one in caches):
            return None
        self._prepare(x.dtype)
        if self.call is None:
            return None
        length = shape[2]
        buffers = [_with_room(cache, length, x.dtype) for cache in caches]
        y = self.call(x, cosine, sine, buffers, length)
        for cache, (keys, values) in zip(caches, buffers, strict=True):
            cache.keys, cache.values = (
                keys.narrow(2, 0, length + 1),
                values.narrow(2, 0, length + 1),
            )
            cache.sparse_bitnet_room = (cache.keys, cache.values, keys, values)
        setattr(y, DONE, self)
        return y

    def _prepare(self, dtype: torch.dtype) -> None:
        """Make the call anew if anything is not what it was made from."""
        weights = [[one.layout("weight") for one in linears] for linears in self._linears]
        norms = [[norm.weight for norm in norms] for norms in self._norms]
        made_from = [torch.get_num_threads(), native.path(), dtype]
        made_from += [one for layer in (*weights, *norms) for one in layer]
        # A parameter or bias may be given other memory and stay the same object.
        made_from += [norm.data_ptr() for layer in norms for norm in layer]
        made_from += [
            0 if linear.bias is None else linear.bias.data_ptr()
            for linears in self._linears
            for linear in linears
        ]
        if len(made_from) == len(self._made_from) and all(
            a is b or (isinstance(a, int) and a == b)
            for a, b in zip(made_from, self._made_from, strict=True)
        ):
            return
        self._made_from, self.call = made_from, None
        for layer_weights, layer_norms in zip(weights, norms, strict=True):
            if any(weight.packed is None for weight in layer_weights) or any(
                norm.dtype != dtype or norm.device.type != "cpu" or not norm.is_contiguous()
                for norm in layer_norms
            ):
                return
        calls = []
        for index, layer in enumerate(self._layers):
            attention, modules, parameters = layer.self_attn, self._norms[index], norms[index]
            biases = [
                None if linear.bias is None else linear.bias.contiguous()
                for linear in self._linears[index]
            ]
            calls.append(
                LayerCall(
                    list(zip(weights[index], biases, strict=True)),
                    (parameters[0], parameters[1]),
                    (modules[0].variance_epsilon, modules[1].variance_epsilon),
                    (parameters[2], parameters[3]) if len(parameters) > 2 else None,
                    modules[2].variance_epsilon if len(modules) > 2 else 0.0,
                    (attention.config.num_attention_heads, attention.config.num_key_value_heads),
                    attention.head_dim,
                    attention.scaling,
                    dtype,
                )
            )
        self.call = StackCall(calls)


def _norms_of(layer: Any) -> list[Any]:
    """Of the layer, of the MLP, and of each query and key head where there are such."""
    head_norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    both = [layer.input_layernorm, layer.post_attention_layernorm]
    return both + [norm for norm in head_norms if norm is not None]


def _with_room(cache: Any, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values with room for a token: those that the cache's tensors are the front of.

    Made anew, longer, where the room is used up or somebody else has changed the tensors.
    """
    room = getattr(cache, "sparse_bitnet_room", None)
    if room is not None and room[0] is cache.keys and room[1] is cache.values:
        keys, values = room[2:]
        if length < keys.shape[2] and keys.dtype == dtype:
            return keys, values
    return _longer(cache.keys, dtype), _longer(cache.values, dtype)


def _longer(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``[1, heads, tokens, head_dim]`` in the front of a longer one."""
    batch, heads, length, width = tensor.shape
    room = max(SPARE_TOKENS, length // 2)
    longer = torch.empty(batch, heads, length + room, width, dtype=dtype)
    longer[:, :, :length] = tensor
    return longer
