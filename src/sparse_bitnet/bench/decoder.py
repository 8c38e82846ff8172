"""Decoders of a given shape with random weights, built to be timed.

The modules are transformers' own with this package's packed linears in them. One layer is drawn,
packed and laid out; the others are copies of it in their own memory, so a 7B model stands in
seconds and reads as many bytes as a trained one.

Attention is the same for all kinds of models: PyTorch's over a prompt, this package's kernel for
one new token over a static cache.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparse_bitnet.core import Pattern
from sparse_bitnet.kernels.platform import compile_options
from sparse_bitnet.nn.attention import ATTENTION
from sparse_bitnet.nn.few_tokens import quantize_in_norms
from sparse_bitnet.nn.fuse import fuse
from sparse_bitnet.nn.int8_head import Int8Head, quantize_rows
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_module import prepare
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.train.presets import preset_config


class StaticLayerCache:
    """Keys and values of one layer, ``[batch, key heads, length, head_dim]``, written in place."""

    def __init__(self, like: Tensor, batch: int, heads: int, length: int, width: int) -> None:
        shape = (batch, heads, length, width)
        self.keys = torch.randn(shape, device=like.device).to(like.dtype)
        self.values = torch.randn(shape, device=like.device).to(like.dtype)
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values at ``position``; returns all of them."""
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


class Decoder:
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

    def __init__(
        self,
        preset: str,
        pattern: Pattern | None,
        *,
        head: str = "bf16",
        layers: int | None = None,
        vocabulary: int | None = None,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        config = preset_config(preset, vocabulary)
        count = layers or config.num_hidden_layers
        config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
        config._attn_implementation = ATTENTION
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        model.requires_grad_(False)
        first = model.model.layers[0]
        if pattern is not None:
            _pack(first, pattern)
        fuse(model)
        prepare(first)
        quantize_in_norms(first)
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.layers = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
        self.embed, self.norm = model.model.embed_tokens, model.model.norm
        self.rotary = model.model.rotary_emb
        self._around = (self._begin, self._end)
        self.head: nn.Module = model.lm_head
        if head == "int8":
            rows, width = model.lm_head.weight.shape
            self.head = Int8Head(rows, width, device=device, dtype=dtype)
            self.head.weight, self.head.weight_scale = quantize_rows(model.lm_head.weight)

    def compile(self) -> None:
        """Compile a layer, once for all of them, and what stands around the layers."""
        options = compile_options()
        for layer in self.layers:
            layer.compile(dynamic=False, options=options)
        self._around = (
            torch.compile(self._begin, dynamic=False, options=options),
            torch.compile(self._end, dynamic=False, options=options),
        )

    def caches(self, batch: int, length: int) -> list[StaticLayerCache]:
        """Static caches of random keys and values."""
        config = self.config
        width = config.hidden_size // config.num_attention_heads
        heads = config.num_key_value_heads or config.num_attention_heads
        like = self.embed.weight
        return [StaticLayerCache(like, batch, heads, length, width) for _ in self.layers]

    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each prompt: ``[batch, tokens]`` → ``[batch, vocabulary]``.

        Keys and values are what the layers compute anyway; they are not copied.
        """
        positions = torch.arange(tokens.shape[1], device=self.device).unsqueeze(0)
        x = self.embed(tokens)
        rotary = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, position_embeddings=rotary)
        _, end = self._around
        return end(x[:, -1].contiguous())

    def decode(self, tokens: Tensor, position: Tensor, caches: list[StaticLayerCache]) -> Tensor:
        """Logits of the next token: ``[batch, 1]``, int64 ``[1]`` → ``[batch, vocabulary]``."""
        begin, end = self._around
        x, rotary, seen = begin(tokens, position, caches[0].keys.shape[2])
        for layer, cache in zip(self.layers, caches, strict=True):
            cache.position = position
            x = layer(x, attention_mask=seen, position_embeddings=rotary, past_key_values=cache)
        return end(x[:, 0].contiguous())

    def _begin(
        self, tokens: Tensor, position: Tensor, length: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Of a decode's step: embedding, its position's cosine and sine, the slots it may see."""
        x = self.embed(tokens)
        slots = torch.arange(length, device=self.device)
        return x, self.rotary(x, position.unsqueeze(0)), (slots <= position).view(1, 1, 1, -1)

    def _end(self, x: Tensor) -> Tensor:
        """The last norm and the head: ``[batch, hidden]`` → ``[batch, vocabulary]``."""
        logits: Tensor = self.head(self.norm(x))
        return logits


def _pack(layer: nn.Module, pattern: Pattern) -> None:
    for name, linear in list(layer.named_modules()):
        if type(linear) is nn.Linear:
            trained = SparseBitLinear(linear, pattern)
            layer.set_submodule(name, pack_module(trained, "two-bit", name))
