"""Tiny random models of the Llama family over packed linears, in transformers' own classes."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from sparse_bitnet.core import Method, Pattern
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
# PyTorch's silu differs by an ulp between contiguous and strided rows whose end is no whole vector,
# and gate is a strided half of the fused product: so the inner width is a multiple of 64.
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture
def packed():
    """``packed("qwen2", dtype, pattern, bits, **config)``: always the same model.

    Norms and biases are random too. With ``pattern`` None its linears stay ``nn.Linear``.
    """

    def make(architecture="qwen2", dtype=torch.float32, pattern="6:8", bits=8, **changes):
        torch.manual_seed(0)
        shape = SHAPE | ({"sliding_window": None} if architecture == "mistral" else {}) | changes
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture](**shape), dtype=dtype)
        model.eval().requires_grad_(False)
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight += torch.randn_like(module.weight) / 4
        for name, module in list(model.model.layers.named_modules()):
            if type(module) is not nn.Linear:
                continue
            if module.bias is not None:
                module.bias += torch.randn_like(module.bias)
            if pattern is not None:
                method = Method(activation_bits=bits)
                trained = SparseBitLinear(module, Pattern.parse(pattern), method)
                model.model.layers.set_submodule(name, pack_module(trained, "two-bit", name))
        return model

    return make


@pytest.fixture
def continuously():
    """Greedy answers of given lengths by transformers' continuous batching."""

    def answers(model, prompts, lengths):
        manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=4, num_blocks=256, max_batch_tokens=32, use_cuda_graph=False
            ),
        )
        manager.start()
        try:
            for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
            found = [manager.get_result(timeout=60) for _ in prompts]
        finally:
            manager.stop(block=True, hard_stop=True)
        by_name = {one.request_id: one.generated_tokens for one in found}
        return [by_name[str(index)] for index in range(len(prompts))]

    return answers
