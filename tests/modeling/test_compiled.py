"""The compiled decoder as it runs on a GPU, which is pretended here.

Every kernel of a GPU is played by its reference on a CPU, so what is tested is the tracing: which
kernels a token takes, and when a compiler compiles again.
"""

import copy
import importlib

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from sparse_bitnet.kernels.matmul import reference, tiles
from sparse_bitnet.kernels.registry import prepare as prepare_weight
from sparse_bitnet.modeling import StaticKeyValueCache, build_decoder, layers
from sparse_bitnet.nn import convert, packed_linear
from sparse_bitnet.nn.int8_head import int8_modules, quantize_rows, swap_int8
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_module import prepare
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# Functions of the package carry the names of these modules.
quantization = importlib.import_module("sparse_bitnet.kernels.quantize_activations")
int8_linear = importlib.import_module("sparse_bitnet.kernels.int8_linear")
decode_attention = importlib.import_module("sparse_bitnet.kernels.decode_attention")

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")


def hopper_matmul(x_q, x_scale, packed, w_scale, bias, out_dtype, residual, sparse):
    ternary = tiles.unpack(packed, w_scale.shape[0], x_q.shape[-1], sparse)
    y = reference.ternary_matmul(x_q, x_scale, ternary, w_scale, bias, out_dtype)
    return y if residual is None else residual + y


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that ran."""
    ran = []

    def played(name, by):
        def kernel(*arguments):
            ran.append(name)
            return by(*arguments)

        library.impl(name, kernel, "CPU")

    def add_norm_quantize(x, delta, weight, epsilon):
        return x + delta, *quantization.reference.quantize_fused(x + delta, weight, epsilon)

    for module in (quantization, int8_linear, decode_attention, layers):
        monkeypatch.setattr(module, "runs_triton", lambda tensor: True)
    library = torch.library.Library("sparse_bitnet", "IMPL")
    played("quantize_activations", quantization.reference.quantize_fused)
    played("add_norm_quantize", add_norm_quantize)
    played("dense_matmul", reference.ternary_matmul)
    played("decode_attention", decode_attention.reference.decode_attention)
    played("hopper_matmul", hopper_matmul)
    torch._dynamo.reset()
    counters.clear()
    yield ran
    library._destroy()
    torch._dynamo.reset()


def graphs():
    return int(counters["stats"]["unique_graphs"])


def packed_model(monkeypatch, config=None):
    """The decoder (of a Qwen2), packed layers laid out as on a GPU, with an int8 head."""

    def as_on_a_gpu(ternary, w_scale, _stored):
        return prepare_weight(ternary, w_scale, backend="hopper")

    monkeypatch.setattr(packed_linear, "prepare", as_on_a_gpu)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or Qwen2Config(**SIZES)).eval()
    table = quantize_rows(model.get_input_embeddings().weight)
    convert(model, "6:8")
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseBitLinear):
            model.set_submodule(name, pack_module(module, "two-bit", name))
    swap_int8(model, int8_modules(model), device="cpu")
    embedding = model.get_input_embeddings()
    embedding.weight.copy_(table[0])
    embedding.weight_scale.copy_(table[1])
    decoder = build_decoder(model).bfloat16()
    prepare(decoder)
    return decoder


def test_a_whole_model_takes_prompts_of_any_length(calls, monkeypatch):
    model = packed_model(monkeypatch, Qwen2Config(**SIZES | {"num_hidden_layers": 1}))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in (40, 300, 7, 2, 1, 64):
            ids = torch.randint(0, 96, (1, length))
            expected = model(input_ids=ids, use_cache=False).logits
            calls.clear()
            found = compiled(input_ids=ids, use_cache=False).logits
            assert (found - expected).abs().max() < 0.05 * expected.abs().max()
            assert "hopper_matmul" in calls
    assert graphs() <= 5


def test_prompt_and_generated_tokens_compiled(calls, monkeypatch):
    model = packed_model(monkeypatch)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for length in (40, 9, 77):
            ids = torch.randint(0, 96, (1, length))
            one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
            for _ in range(6):
                expected = model(input_ids=ids, past_key_values=one).logits
                found = compiled(input_ids=ids, past_key_values=other).logits
                assert (found - expected).abs().max() < 0.05 * expected.abs().max()
                ids = expected[:, -1:].argmax(-1)
    assert "decode_attention" in calls
    assert not counters["graph_break"]
    assert graphs() <= 6


@pytest.mark.parametrize("length", [1, 40])
def test_kernels_of_a_layer(calls, monkeypatch, length):
    """Norm and quantization, residual sum, SwiGLU: each rides in a kernel beside it."""
    model = packed_model(monkeypatch)
    ids = torch.randint(0, 96, (1, length))
    layer = [
        "quantize_activations",
        "hopper_matmul",
        *(["decode_attention"] if length == 1 else []),
        "quantize_activations",
        "hopper_matmul",
        "add_norm_quantize",
        "hopper_matmul",
        "quantize_activations",
        "hopper_matmul",
    ]
    with torch.no_grad():
        eager = model(input_ids=ids, use_cache=False).logits
        assert calls[: 2 * len(layer)] == 2 * layer
        calls.clear()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(input_ids=ids, use_cache=False).logits
        assert calls[: 2 * len(layer)] == 2 * layer
        with monkeypatch.context() as patch:  # module by module
            patch.setattr(layers, "runs_triton", lambda tensor: False)
            expected = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, eager)
    assert (eager - expected).abs().max() < 0.05 * expected.abs().max()


def test_norms_of_another_dtype_stay_the_compilers(calls, monkeypatch):
    model = packed_model(monkeypatch)
    for layer in model.model.layers:
        layer.input_layernorm.float()
    ids = torch.randint(0, 96, (1, 1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        calls.clear()
        found = torch.compile(model, backend="aot_eager")(input_ids=ids, use_cache=False).logits
    assert "add_norm_quantize" not in calls
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_layers_that_are_alike_share_a_graph(calls, monkeypatch):
    model = packed_model(monkeypatch)
    expected = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend="aot_eager")
    caches = [StaticKeyValueCache(model.config, 1, 8, torch.bfloat16, "cpu") for _ in range(2)]
    with torch.no_grad():
        for token in range(4):
            ids = torch.full((1, 1), token)
            one, other = (
                m(ids, past_key_values=c).logits
                for m, c in zip((model, expected), caches, strict=True)
            )
            assert (one - other).abs().max() < 0.05 * other.abs().max()
    assert calls.count("add_norm_quantize") == 2 * 2 * 4  # layers, models, tokens
    assert graphs() == 1


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True),
        MistralConfig(**SIZES, head_dim=8, sliding_window=4),
        Qwen3Config(**SIZES, head_dim=8),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("shape", [(3, 1), (2, 5)])
def test_few_tokens_of_other_architectures(calls, monkeypatch, config, shape):
    """Sequences of several lengths over a cache, with biases, windows, norms of heads."""
    model = packed_model(monkeypatch, config)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.normal_()
    ids, new = torch.randint(0, 96, (shape[0], 9)), torch.randint(0, 96, shape)
    mask = torch.ones(shape[0], 9 + shape[1], dtype=torch.long)
    mask[1:, :3] = 0

    def logits(step):
        cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask[:, :9], past_key_values=cache)
            found = step(input_ids=new, attention_mask=mask, past_key_values=cache).logits
        return found

    expected = logits(model)
    calls.clear()
    found = logits(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert calls.count("add_norm_quantize") == 2 * 2  # layers; the prompt and the step
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
