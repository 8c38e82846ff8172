"""The models of ``cpu_inference.py``: one shape, the same random ternary weights in every row.

Weights of one layer are drawn, and every layer is a copy of them in its own memory: it reads as
many bytes as a trained model. Rows of BF16 and FP32 hold what the ternary weights stand for.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.core import Pattern, ternarize
from sparse_bitnet.kernels.native.pages import use_large_pages
from sparse_bitnet.modeling import KeyValueCache, build_decoder
from sparse_bitnet.nn.int8_head import Int8Table, int8_modules, swap_int8
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_module import PackedModule, prepare
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.train.presets import preset_config

PRESET, VOCABULARY = "qwen2.5-1.5b", 32_000
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


def _dense(pattern: str, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model of one layer whose linears hold γ·T of random weights; the others come later."""
    torch.manual_seed(0)
    config = preset_config(PRESET, VOCABULARY)
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.model.layers[0].modules():
        if type(module) is nn.Linear:
            ternary, scale = ternarize(module.weight.detach(), Pattern.parse(pattern))
            module.weight.data = ternary * scale.to(torch.float16).float()  # TQ2_0 keeps it so
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    return model.to(dtype).eval().requires_grad_(False)


def _repeat(model: PreTrainedModel) -> None:
    first, layers = model.model.layers[0], model.config.num_hidden_layers
    model.model.layers = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(1, layers))])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index


class Transformers:
    """The package's decoder, eager: plain linears, or packed ones of this package.

    Args:
        pattern: of the weights.
        packed: whether the linears are this package's, and the head int8.
        dtype: to compute in.
        layers: of the model.
    """

    def __init__(self, pattern: str, packed: bool, dtype: torch.dtype, layers: int) -> None:
        model = _dense(pattern, layers, dtype)
        if packed:
            for name, module in list(model.model.layers[0].named_modules()):
                if type(module) is nn.Linear:
                    trained = SparseBitLinear(module.float(), Pattern.parse(pattern))
                    packed_linear = pack_module(trained, "two-bit", name).to(dtype)
                    model.model.layers[0].set_submodule(name, packed_linear)
            _int8_head(model)
        _repeat(model)
        model = build_decoder(model)
        prepare(model)
        for module in model.modules():
            if isinstance(module, Int8Table):
                use_large_pages(module.weight)
        # A row of a longer tensor makes PyTorch 2.13 copy the head's weight; not what is measured.
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        head.register_forward_pre_hook(lambda _module, args: (args[0].clone(),))
        self.model = model
        self.weight_bytes = _weight_bytes(model)

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> float:
        self.cache = KeyValueCache(self.model.config)
        return self._step(torch.tensor([tokens]))

    @torch.inference_mode()
    def decode(self, count: int) -> float:
        return sum(self._step(self.next) for _ in range(count))

    def _step(self, tokens: Tensor) -> float:
        started = time.perf_counter()
        logits = self.model(tokens, past_key_values=self.cache, logits_to_keep=1).logits
        self.next = logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started


def _int8_head(model: PreTrainedModel) -> None:
    from sparse_bitnet.nn.int8_head import quantize_rows

    weight, scale = quantize_rows(model.get_input_embeddings().weight)
    swap_int8(model, int8_modules(model))
    for module in model.modules():
        if "weight_scale" in module._buffers and module._buffers["weight"].shape[0] == VOCABULARY:
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


class LlamaCpp:
    """The model in llama.cpp, as a GGUF file with ternary linears and a Q8_0 head."""

    def __init__(self, file: Path, threads: int) -> None:
        from llama_cpp import Llama

        self.weight_bytes = file.stat().st_size
        self.llama = Llama(
            str(file),
            n_ctx=1024,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def prefill(self, tokens: list[int]) -> float:
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()
        started = time.perf_counter()
        self.llama.eval(tokens)
        return time.perf_counter() - started

    def decode(self, count: int) -> float:
        started = time.perf_counter()
        for index in range(count):
            self.llama.eval([index])
        return time.perf_counter() - started


def write_gguf(file: Path, pattern: str, layers: int, form: str = "TQ2_0") -> None:
    """The same model for llama.cpp, without a tokenizer."""
    import gguf

    model = _dense(pattern, layers, torch.float32)
    config: Any = model.config
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[form]

    def add(name: str, tensor: Tensor, quantized: gguf.GGMLQuantizationType | None = None) -> None:
        values = tensor.detach().float().numpy()
        if quantized is None:
            writer.add_tensor(name, values.astype(np.float32))
        else:
            data = gguf.quants.quantize(values, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)

    add("token_embd.weight", model.get_input_embeddings().weight, gguf.GGMLQuantizationType.Q8_0)
    add("output_norm.weight", model.model.norm.weight)
    quantized: dict[str, np.ndarray] = {}
    for index in range(layers):
        for name, module in model.model.layers[0].named_modules():
            if name not in GGUF_NAMES:
                continue
            to = f"blk.{index}.{GGUF_NAMES[name]}"
            if isinstance(module, nn.Linear):
                if name not in quantized:
                    values = module.weight.detach().numpy()
                    quantized[name] = gguf.quants.quantize(values, kind)
                writer.add_tensor(f"{to}.weight", quantized[name], raw_dtype=kind)
                if module.bias is not None:
                    add(f"{to}.bias", module.bias)
            else:
                add(f"{to}.weight", module.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
