"""Build the fused decoder from a transformers model over packed linears."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_bitnet.core import ConfigError
from sparse_bitnet.modeling.decoder import Decoder, DecoderForCausalLM
from sparse_bitnet.modeling.layers import MLP, Attention, DecoderLayer, Head, RMSNorm
from sparse_bitnet.nn.packed_linear import PackedLinear

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""transformers' classes whose forward is the decoder's."""


def unsupported(model: PreTrainedModel) -> str | None:
    """Why :func:`build_decoder` does not take this model; None if it does."""
    kind = type(model)
    if kind.__name__ not in ARCHITECTURES or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not of the Llama family"
    for name, layer in model.get_decoder().layers.named_children():
        for linears in (_qkv(layer), _gate_up(layer)):
            if not _can_fuse(linears):
                kinds = ", ".join(f"{type(one).__name__} {one.extra_repr()}" for one in linears)
                return f"layer {name} reads one input with linears that differ: {kinds}"
    return None


@torch.no_grad()
def build_decoder(model: PreTrainedModel) -> DecoderForCausalLM:
    """The decoder with the weights of a model that runs packed, or with plain ``nn.Linear``.

    Args:
        model: of :data:`ARCHITECTURES`. It is used up: its modules move into the decoder, layer by
            layer, so that at most one layer's weights are there twice.

    Raises:
        ConfigError: for a model that :func:`unsupported` names a reason for.
    """
    why = unsupported(model)
    if why is not None:
        raise ConfigError(f"this model cannot become the fused decoder: {why}")
    config, body = model.config, model.get_decoder()
    layers: list[DecoderLayer] = []
    for index in range(len(body.layers)):
        layers.append(_layer(body.layers[index], config, index))
        body.layers[index] = nn.Identity()
    decoder = Decoder(config, body.embed_tokens, layers, _norm(body.norm), body.rotary_emb)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head = Head(head)
    return DecoderForCausalLM(decoder, head, model.generation_config)


def _layer(layer: Any, config: Any, index: int) -> DecoderLayer:
    source = layer.self_attn
    head_norms = None
    if hasattr(source, "q_norm"):
        head_norms = _norm(source.q_norm), _norm(source.k_norm)
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)  # Mistral's has no types: all layers have it
    if types is not None and types[index] != "sliding_attention":
        window = None
    attention = Attention(
        config, index, fuse(_qkv(layer)), source.o_proj, head_norms, source.head_dim, window
    )
    mlp = MLP(fuse(_gate_up(layer)), layer.mlp.down_proj, config.hidden_act)
    norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
    return DecoderLayer(attention, mlp, *norms)


def _norm(norm: Any) -> RMSNorm:
    return RMSNorm(norm.weight, norm.variance_epsilon)


def _qkv(layer: Any) -> list[Any]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _gate_up(layer: Any) -> list[Any]:
    return [layer.mlp.gate_proj, layer.mlp.up_proj]


def fuse(linears: list[Any]) -> nn.Module:
    """One linear whose output is that of the given ones, which :func:`_can_fuse`, side by side."""
    first, rows = linears[0], sum(linear.out_features for linear in linears)
    bias = _fused_bias(linears)
    if isinstance(first, PackedLinear):
        shard_sizes = sum((one.spec.shard_sizes or (one.out_features,) for one in linears), ())
        spec = replace(first.spec, shard_sizes=shard_sizes)
        fused = PackedLinear(
            first.in_features, rows, False, spec=spec, where=first.where, device="meta"
        )
        for name in ("weight", "weight_scale"):
            fused.register_buffer(name, torch.cat([one.get_buffer(name) for one in linears]))
        fused.register_buffer("bias", bias)
        return fused
    plain = nn.Linear(first.in_features, rows, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(torch.cat([one.weight for one in linears]), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain


def _fused_bias(linears: list[Any]) -> Tensor | None:
    """Biases side by side, zeros where a layer has none; None if no layer has one."""
    given = [one.bias for one in linears if one.bias is not None]
    if not given:
        return None
    parts = [
        given[0].new_zeros(one.out_features) if one.bias is None else one.bias for one in linears
    ]
    return torch.cat(parts).detach()


def _can_fuse(linears: list[Any]) -> bool:
    if all(isinstance(one, PackedLinear) for one in linears):
        return len({(one.in_features, replace(one.spec, shard_sizes=())) for one in linears}) == 1
    plain = all(type(one) is nn.Linear for one in linears)
    return plain and len({one.in_features for one in linears}) == 1
