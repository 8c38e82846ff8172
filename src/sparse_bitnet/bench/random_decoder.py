"""The decoder in a given shape with random weights, built to be timed.

One layer is drawn, packed and prepared; the others are copies of it in their own memory, so a 7B
model stands in seconds and reads as many bytes as a trained one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from sparse_bitnet.core import Pattern
from sparse_bitnet.kernels.platform import compile_options
from sparse_bitnet.modeling import DecoderForCausalLM, build_decoder
from sparse_bitnet.modeling.decoder import Decoder
from sparse_bitnet.nn.int8_head import Int8Head, quantize_rows
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_module import prepare
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.train.presets import preset_config


def random_decoder(
    preset: str,
    pattern: Pattern | None,
    *,
    head: str = "bf16",
    layers: int | None = None,
    vocabulary: int | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> DecoderForCausalLM:
    """A decoder of a preset's shape.

    Args:
        preset: a key of :data:`sparse_bitnet.train.presets.PRESETS`.
        pattern: of ternary linears; None leaves them in full precision.
        head: ``bf16`` or ``int8``.
        layers: how many; those of the preset if left out.
        vocabulary: of small shapes, which publish none.
        device, dtype: where and in what it computes.

    Raises:
        ConfigError: for an unknown preset.
        PatternError: if M does not divide a layer's input features.
    """
    config = preset_config(preset, vocabulary)
    count = layers or config.num_hidden_layers
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.requires_grad_(False)
    if pattern is not None:
        for name, linear in list(model.model.layers.named_modules()):
            if type(linear) is nn.Linear:
                trained = SparseBitLinear(linear, pattern)
                model.model.layers.set_submodule(name, pack_module(trained, "two-bit", name))
    if head == "int8":
        rows, width = model.lm_head.weight.shape
        int8 = Int8Head(rows, width, device=device, dtype=dtype)
        int8.weight, int8.weight_scale = quantize_rows(model.lm_head.weight)
        model.lm_head = int8
    one = build_decoder(model)
    prepare(one)
    body = one.model
    config.num_hidden_layers, config.layer_types = count, ["full_attention"] * count
    first: Any = body.layers[0]
    stack = [first, *(copy.deepcopy(first, {id(config): config}) for _ in range(count - 1))]
    for index, layer in enumerate(stack):
        layer.self_attn.layer_idx = index
    whole = Decoder(config, body.embed_tokens, stack, body.norm, body.rotary_emb)
    return DecoderForCausalLM(whole, one.lm_head, GenerationConfig.from_model_config(config))


def compile_parts(model: DecoderForCausalLM) -> None:
    """Compile a layer, once for all of them, and what stands around the layers."""
    for part in (*model.model.layers, model.model.rotary_emb, model.model.norm):
        part.compile(dynamic=False, options=compile_options())
