"""The models of ``cpu_inference.py``: one shape, the same random ternary weights in every row.

Weights of one layer are drawn, and every layer is a copy of them in its own memory: it reads as
many bytes as a trained model. Rows of BF16 and FP32 hold what the ternary weights stand for.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sparse_bitnet.core import Pattern, ternarize
from sparse_bitnet.kernels.native.pages import use_large_pages
from sparse_bitnet.modeling import KeyValueCache, build_decoder
from sparse_bitnet.nn.int8_head import Int8Table, int8_modules, quantize_rows, swap_int8
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_module import PackedModule, prepare
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.train.presets import preset_config


@dataclass(frozen=True)
class Shape:
    """A model's shape: a family of transformers, and how much of it is built."""

    name: str
    vocabulary: int
    layers: int

    def config(self) -> Any:
        if self.name == "smollm2-135m":
            return LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=576,
                intermediate_size=1536,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        return preset_config(self.name, self.vocabulary)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


class Engine(Protocol):
    """Something that runs the model: seconds of a prompt, and of tokens after it."""

    weight_bytes: int

    def prefill(self, tokens: list[int]) -> float: ...

    def decode(self, count: int) -> float: ...


def _dense(pattern: str, shape: Shape, dtype: torch.dtype) -> PreTrainedModel:
    """A model of one layer whose linears hold γ·T of random weights; the others come later."""
    torch.manual_seed(0)
    config, layers = shape.config(), shape.layers
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.model.layers[0].modules():
        if type(module) is nn.Linear:
            ternary, scale = ternarize(module.weight.detach(), Pattern.parse(pattern))
            module.weight.data = ternary * scale.to(torch.float16).float()  # TQ2_0 keeps it so
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    dense: PreTrainedModel = model.to(dtype).eval().requires_grad_(False)
    return dense


def _repeat(model: PreTrainedModel) -> None:
    first, layers = model.model.layers[0], model.config.num_hidden_layers
    model.model.layers = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(1, layers))])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index


class Transformers:
    """The package's decoder, eager: plain linears, or packed ones of this package.

    Args:
        shape: of the model.
        pattern: of the weights.
        packed: whether the linears are this package's.
        int8_head: whether the head is int8, or of the dtype.
        dtype: to compute in.
    """

    def __init__(
        self, shape: Shape, pattern: str, packed: bool, int8_head: bool, dtype: torch.dtype
    ) -> None:
        model = _dense(pattern, shape, dtype)
        if packed:
            for name, module in list(model.model.layers[0].named_modules()):
                if type(module) is nn.Linear:
                    trained = SparseBitLinear(module.float(), Pattern.parse(pattern))
                    packed_linear = pack_module(trained, "two-bit", name).to(dtype)
                    model.model.layers[0].set_submodule(name, packed_linear)
        if int8_head:
            _int8_head(model)
        _repeat(model)
        model = build_decoder(model)
        prepare(model)
        head: Any = model.get_output_embeddings()
        use_large_pages(head.weight)
        self.model = model
        self.weight_bytes = _weight_bytes(model)

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> float:
        self.cache = KeyValueCache(self.model.config)
        return self._step(tokens)

    @torch.inference_mode()
    def decode(self, count: int) -> float:
        return sum(self._step([index % 1000]) for index in range(count))

    def _step(self, tokens: list[int]) -> float:
        started = time.perf_counter()
        self.model(torch.tensor([tokens]), past_key_values=self.cache, logits_to_keep=1)
        return time.perf_counter() - started


def _int8_head(model: PreTrainedModel) -> None:
    embedding: Any = model.get_input_embeddings()
    weight, scale = quantize_rows(embedding.weight)
    swap_int8(model, int8_modules(model))
    for module in model.modules():
        if isinstance(module, Int8Table):
            module._buffers["weight"], module._buffers["weight_scale"] = weight, scale


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes that one token reads: linears as they are laid out, and the head."""
    total = 0
    for module in model.modules():
        if isinstance(module, PackedModule):
            for name in module.weight_shapes:
                layout = module.prepared(name)
                total += layout.packed.nbytes
        elif type(module) is nn.Linear and module is not model.get_output_embeddings():
            total += module.weight.nbytes
    head = model.get_output_embeddings()
    assert head is not None
    weight = head.weight
    assert isinstance(weight, Tensor)
    return total + weight.nbytes


def write_gguf(file: Path, shape: Shape, pattern: str, form: str, head: str) -> None:
    """The same model for llama.cpp, without a tokenizer.

    Args:
        form: of the linears; rows that are no whole blocks of it become Q4_0, which holds them too.
        head: type of the embedding and the head.
    """
    import gguf

    model = _dense(pattern, shape, torch.float32)
    config: Any = model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")

    def quantized(tensor: Tensor, form: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        kind = gguf.GGMLQuantizationType[form]
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.Q4_0
        return gguf.quants.quantize(tensor.detach().float().numpy(), kind), kind

    def plain(name: str, tensor: Tensor) -> None:
        writer.add_tensor(name, tensor.detach().float().numpy())

    embedding: Any = model.get_input_embeddings()
    table, kind = quantized(embedding.weight, head)
    writer.add_tensor("token_embd.weight", table, raw_dtype=kind)
    plain("output_norm.weight", model.model.norm.weight)
    for name, module in model.model.layers[0].named_modules():
        if name not in GGUF_NAMES:
            continue
        linear = isinstance(module, nn.Linear)
        packed = quantized(module.weight, form) if linear else None
        for index in range(shape.layers):
            to = f"blk.{index}.{GGUF_NAMES[name]}"
            if packed is None:
                plain(f"{to}.weight", module.weight)
                continue
            writer.add_tensor(f"{to}.weight", packed[0], raw_dtype=packed[1])
            if module.bias is not None:
                plain(f"{to}.bias", module.bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
