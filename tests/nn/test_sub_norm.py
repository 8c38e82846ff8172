"""SubLN: begins near the model that it is added to, and goes the whole way from there."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitNetForCausalLM, LlamaConfig, Qwen2Config

import packed_models
from sparse_bitnet.core import ConfigError
from sparse_bitnet.export.bitnet.write import export_bitnet
from sparse_bitnet.nn import convert
from sparse_bitnet.nn.sub_norm import add_sub_norms
from sparse_bitnet.packed.load import load
from sparse_bitnet.packed.write import pack

SHAPE = packed_models.SMALL | {"vocab_size": 64, "intermediate_size": 64}
TOKENS = torch.arange(48).view(2, 24)


def llama(**changes):
    torch.manual_seed(0)
    shape = {**SHAPE, "rope_theta": 5000.0, "attention_bias": True, **changes}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_kept_and_the_new_ones_fit(tied):
    model = llama(tie_word_embeddings=tied)
    seen = {}
    layer = model.model.layers[0]
    for name, module in (("attn", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj)):
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        wanted = model(TOKENS).logits
        x_of = dict(seen)
        new = add_sub_norms(model, TOKENS)
        found = new(TOKENS).logits
        norms = {"attn": new.model.layers[0].self_attn.attn_sub_norm}
        norms["ffn"] = new.model.layers[0].mlp.ffn_sub_norm
        for name, norm in norms.items():
            x = x_of[name].flatten(0, 1)
            normed = x / x.square().mean(-1, keepdim=True).sqrt()
            fitted = torch.cat(
                [torch.linalg.lstsq(normed[:, [c]], x[:, [c]]).solution[0] for c in range(len(x.T))]
            )
            assert torch.allclose(norm.weight, fitted, rtol=1e-4)
        for norm in (m for n, m in new.named_modules() if n.endswith("sub_norm")):
            norm.weight.fill_(1)
        plain = new(TOKENS).logits
    assert isinstance(new, BitNetForCausalLM)
    assert (new.lm_head.weight is new.model.embed_tokens.weight) == tied
    kept = {name: p.data_ptr() for name, p in model.named_parameters()}
    taken = {n: p.data_ptr() for n, p in new.named_parameters() if "sub_norm" not in n}
    assert taken == kept
    assert (found - wanted).norm() < 0.5 * (plain - wanted).norm()


def test_with_norms_that_do_nothing_it_is_the_model():
    """Everything else of the two architectures is equal: activation, rotation, scaling, biases."""
    model = llama()
    with torch.no_grad():
        wanted = model(TOKENS).logits
        new = add_sub_norms(model, TOKENS)
        for block in new.model.layers:
            block.self_attn.attn_sub_norm = block.mlp.ffn_sub_norm = torch.nn.Identity()
        assert torch.equal(new(TOKENS).logits, wanted)


@pytest.mark.parametrize(
    "line",
    [
        "import sparse_bitnet; from transformers import BitNetConfig, BitNetForCausalLM",
        "import sparse_bitnet.export.verbs",
    ],
)
def test_transformers_is_imported_by_any_way(only_torch, line):
    """Its quantizers import this package's, and with it ``nn``, before it has its models."""
    done = only_torch(line)
    assert done.returncode == 0, done.stderr


@torch.compiler.set_stance("force_eager")  # transformers' layers compile themselves
def test_packed_and_exported(tmp_path):
    model = add_sub_norms(llama(attention_bias=False), TOKENS)
    convert(model, "6:8")
    with torch.no_grad():
        wanted = model(TOKENS).logits
        pack(model, tmp_path / "packed")
        assert torch.equal(load(tmp_path / "packed")[0](TOKENS).logits, wanted)
        export_bitnet(tmp_path / "packed", tmp_path / "bitnet")
        there = AutoModelForCausalLM.from_pretrained(tmp_path / "bitnet", dtype=torch.float32)
        assert torch.allclose(there(TOKENS).logits, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: llama(mlp_bias=True), "biases in its MLP"),
        (lambda: llama(head_dim=16), "heads of another width"),
        (lambda: AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE)), "is a qwen2"),
    ],
)
def test_what_the_architecture_does_not_compute(model, why):
    with pytest.raises(ConfigError, match=why):
        add_sub_norms(model(), TOKENS)
