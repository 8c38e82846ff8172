"""int8 tables: what they round, what they keep when a model moves, what they refuse."""

import copy

import pytest
import torch
from torch import nn

from sparse_bitnet.core import ConfigError, WeightError
from sparse_bitnet.nn.int8_head import (
    Int8Embedding,
    Int8Head,
    TiedInt8Head,
    int8_modules,
    quantize_rows,
    swap_int8,
)
from tiny_models import tiny


def small(architecture, **changes):
    return tiny(architecture, vocab_size=90, num_hidden_layers=1, **changes).eval()


def qwen(tied):
    return small("qwen2", tie_word_embeddings=tied)


def swapped(tied):
    """A model with an int8 head, filled, and the float model of the same (rounded) values."""
    model, other = qwen(tied), qwen(tied)
    names = int8_modules(model)
    swap_int8(model, names, device="cpu")
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, TiedInt8Head):
            continue
        weight = other.get_submodule(name).weight
        module.weight[:], module.weight_scale[:] = quantize_rows(weight)
        weight.data = module.dequantize()
    return model, other


@torch.no_grad()
def logits(model):
    torch.manual_seed(1)
    return model(torch.randint(0, 90, (2, 9))).logits


@pytest.mark.parametrize("tied", [True, False])
def test_computes_what_the_rounded_weights_do(tied):
    model, other = swapped(tied)
    expected = logits(other)
    assert (logits(model) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert isinstance(model.lm_head, TiedInt8Head if tied else Int8Head)
    assert isinstance(model.model.embed_tokens, Int8Embedding if tied else nn.Embedding)
    assert list(int8_modules(qwen(tied))) == (["model.embed_tokens"] if tied else []) + ["lm_head"]


@pytest.mark.parametrize("tied", [True, False])
def test_one_table_when_tied_wherever_the_model_goes(tied):
    model, _ = swapped(tied)
    before = logits(model)
    other = copy.deepcopy(model).to(torch.bfloat16).float()
    keys = {key for key in model.state_dict() if "embed" in key or "head" in key}
    if tied:
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert other.lm_head.table is not model.lm_head.table
        assert keys == {"model.embed_tokens.weight", "model.embed_tokens.weight_scale"}
        model.tie_weights()
        assert torch.equal(logits(model), before)
    table = other.lm_head.table if tied else other.lm_head
    original = model.lm_head.table if tied else model.lm_head
    assert table.weight.dtype == torch.int8
    assert torch.equal(table.weight_scale, original.weight_scale)
    half = copy.deepcopy(model).half()
    assert half.model.embed_tokens(torch.tensor([1])).dtype == torch.float16
    assert half.lm_head(torch.zeros(1, 32).half()).dtype == torch.float16


@pytest.mark.parametrize("tied", [True, False])
def test_compiles_without_a_break(tied):
    model, _ = swapped(tied)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(compiled), logits(model))


def test_a_head_with_a_bias():
    model = small("phi", num_key_value_heads=4, tie_word_embeddings=False)
    nn.init.normal_(model.lm_head.bias)
    weight, bias = model.lm_head.weight.detach(), model.lm_head.bias.detach()
    swap_int8(model, int8_modules(model), device="cpu")
    head = model.lm_head
    head.weight[:], head.weight_scale[:] = quantize_rows(weight)
    head.bias[:] = bias
    x = torch.randn(3, 32)
    assert torch.allclose(head(x), x @ head.dequantize().t() + bias, atol=1e-4)


def test_rounding_is_half_a_step_and_zero_rows_stay_zero():
    weight = torch.randn(20_000, 6) * torch.rand(20_000, 1)
    weight[7] = 0
    quantized, scale = quantize_rows(weight)
    assert quantized.dtype == torch.int8 and quantized.abs().max() == 127
    assert ((quantized * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert scale[7] == 1 and not quantized[7].any()
    weight[3, 1] = torch.nan
    with pytest.raises(WeightError, match=r"head: 1 of .* values are NaN"):
        quantize_rows(weight, "head")


def test_refuses_what_it_would_compute_wrongly():
    with pytest.raises(ConfigError, match="tied to a Gemma3TextScaledWordEmbedding, which does mo"):
        int8_modules(small("gemma3_text", head_dim=8))
    model = qwen(True)
    model.lm_head = nn.Identity()
    with pytest.raises(ConfigError, match="the output head of this Qwen2ForCausalLM is a Identity"):
        int8_modules(model)
    with pytest.raises(ConfigError, match=r"model.norm: a Qwen2RMSNorm cannot be int8"):
        swap_int8(qwen(True), ["model.norm"])
    with pytest.raises(ConfigError, match="nothing: a NoneType cannot be int8"):
        swap_int8(qwen(True), ["nothing"])


def test_activations_that_became_integers_are_refused():
    """Mamba casts what goes into its head to the dtype of the head's weight."""
    shape = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16, "state_size": 16}
    model = small("mamba2", **shape)
    swap_int8(model, int8_modules(model), device="cpu")
    model.lm_head.weight.fill_(1)
    model.lm_head.weight_scale.fill_(1)
    with pytest.raises(ConfigError, match=r"activations of torch\.int8; .* with --head float when"):
        model(torch.ones(1, 4, dtype=torch.long))
