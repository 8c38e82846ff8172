"""Fused projections compute what the separate ones do, and what cannot be fused is left alone."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig

from sparse_bitnet.core import ConfigError, Pattern
from sparse_bitnet.modeling import build_decoder, unsupported
from sparse_bitnet.modeling.build import fuse
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear


@pytest.mark.parametrize("pack", [True, False])
def test_every_matrix_keeps_its_own_scale_and_bias(pack):
    linears = [nn.Linear(16, out, bias=out != 5) for out in (3, 5, 8)]
    parts = list(linears)
    if pack:
        parts = [pack_module(SparseBitLinear(linear), "trits", "l") for linear in linears]
    fused = fuse(parts)
    if isinstance(fused, PackedLinear):
        assert fused.spec.shard_sizes == (3, 5, 8)
    x = torch.randn(4, 16)
    expected = torch.cat([part(x) for part in parts], dim=-1)
    # Float products of other shapes may sum in another order; integers do not.
    torch.testing.assert_close(fused(x), expected, **({"rtol": 0, "atol": 0} if pack else {}))


def test_a_fused_linear_is_fused_again():
    first = fuse([pack_module(SparseBitLinear(nn.Linear(16, n)), "trits", "l") for n in (3, 5)])
    second = pack_module(SparseBitLinear(nn.Linear(16, 4)), "trits", "l")
    whole = fuse([first, second])
    assert whole.spec.shard_sizes == (3, 5, 4)
    x = torch.randn(2, 16)
    assert torch.equal(whole(x), torch.cat([first(x), second(x)], -1))


def test_names_and_shapes(packed):
    decoder = build_decoder(packed("qwen3"))
    layer = decoder.model.layers[1]
    assert layer.self_attn.qkv_proj.out_features == (6 + 2 + 2) * 32
    assert layer.mlp.gate_up_proj.out_features == 2 * 192
    assert decoder.base_model is decoder.model
    assert decoder.get_output_embeddings() is decoder.lm_head
    assert not decoder.training and not any(p.requires_grad for p in decoder.parameters())


def test_the_model_is_used_up(packed):
    model = packed()
    build_decoder(model)
    assert not any(isinstance(module, PackedLinear) for module in model.model.layers.modules())


def test_other_architectures_are_refused():
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for config in (GPTNeoXConfig(**sizes), MixtralConfig(**sizes, num_key_value_heads=1)):
        model = AutoModelForCausalLM.from_config(config)
        why = unsupported(model)
        assert why == f"{type(model).__name__} is not of the Llama family"
        with pytest.raises(ConfigError, match=r"cannot become the fused decoder: .* not of the"):
            build_decoder(model)


def test_a_class_of_the_same_name_is_refused(packed):
    model = packed()
    own = type("Qwen2ForCausalLM", (type(model),), {"__module__": __name__})
    assert unsupported(own(model.config)) == "Qwen2ForCausalLM is not of the Llama family"


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.up_proj"])
def test_a_layer_of_mixed_linears_is_refused(packed, name):
    for spec in ("2:4", None):
        model = packed()
        layer = model.model.layers[1]
        linear = nn.Linear(96, layer.get_submodule(name).out_features)
        if spec is not None:
            linear = pack_module(SparseBitLinear(linear, Pattern.parse(spec)), "two-bit", name)
        layer.set_submodule(name, linear)
        assert "layer 1 reads one input with linears that differ" in (unsupported(model) or "")
