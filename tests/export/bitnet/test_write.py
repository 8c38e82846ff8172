"""Exports in the bitnet format, read by stock transformers in a process without this package."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_bitnet.core import ConfigError, Method
from sparse_bitnet.export.bitnet.read import import_bitnet
from sparse_bitnet.export.bitnet.write import export_bitnet
from sparse_bitnet.nn import SparseBitLinear, convert
from sparse_bitnet.packed.load import load
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train import SparsityConfig, load_trained, save_trained

CLASSES = ["bitlinear", "autobitlinear"]
# Sums and scales differ in the last bits of float32. That may turn a rounding of an activation,
# and then a logit by one quantization step; not so with these few tokens.
TOLERANCE = 1e-5


def save(model, directory, tokenizer=None, **sparsity):
    return save_trained(
        model, tokenizer, directory, SparsityConfig(**{"pattern": "6:8"} | sparsity)
    )


def close(one, two):
    return float((one - two).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_stock_transformers_computes_our_logits(
    tmp_path, trained, logits, stock, architecture, tokenizer
):
    model = trained(architecture)
    save(model, tmp_path / "trained", tokenizer)
    pack(model, tmp_path / "packed", storage="trits", tokenizer=tokenizer)
    outs = []
    for linear_class in CLASSES:
        for source in ("trained", "packed"):
            out = tmp_path / f"{source}-{linear_class}"
            result = export_bitnet(tmp_path / source, out, linear_class=linear_class)
            assert result.weights == sum(
                m.weight.numel() for m in model.modules() if isinstance(m, SparseBitLinear)
            )
            outs.append(out)
    expected = logits(model)
    for out in outs:
        assert close(stock(out), expected), out.name
    weights = [load_file(out / "model.safetensors") for out in outs]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    scale, inverse = weights[2], weights[0]
    name = "model.layers.0.mlp.up_proj.weight_scale"
    assert scale[name].item() == pytest.approx(1 / inverse[name].item(), rel=1e-6)
    described = json.loads((outs[0] / "config.json").read_text())
    assert "auto_map" not in described
    assert described["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    assert (outs[0] / "tokenizer.json").exists()


@torch.compiler.set_stance("force_eager")  # transformers' layers compile themselves
def test_every_layer_of_a_deep_untrained_model(tmp_path):
    """Logits of such models differ, and the export is not why: the model carries a last bit as far.

    On equal inputs every layer agrees to a few roundings of float32.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, initializer_range=0.3, **shape, **heads)
    ).eval()
    convert(model, "6:8")
    save(model, tmp_path / "trained")
    export_bitnet(tmp_path / "trained", tmp_path / "out")
    other = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.randint(64, (2, 24))

    def compare(name):
        def hook(_module, args, output):
            apart = (other.get_submodule(name)(args[0]) - output).abs().max()
            assert apart <= 1e-6 * output.abs().max(), name

        return hook

    embedding = model.get_input_embeddings()
    with torch.no_grad():
        logits = model(tokens).logits
        exported = float((other(tokens).logits - logits).abs().max())
        noise = embedding.register_forward_hook(
            lambda _m, _a, output: output * (1 + 6e-8 * torch.randn_like(output))
        )
        # Of several: whether a last bit turns a rounding over is a processor's luck.
        own = max(float((model(tokens).logits - logits).abs().max()) for _ in range(12))
        noise.remove()
        for name, module in model.named_modules():
            if isinstance(module, SparseBitLinear):
                module.register_forward_hook(compare(name))
        model(tokens)
    assert own > 1e-3 and exported < 10 * own


def test_layers_left_in_full_precision(tmp_path, build, logits, stock):
    rules = {r"layers\.0\.mlp": "skip", "o_proj": "4:8"}
    model = build("qwen2")
    convert(model, "6:8", rules=rules)
    save(model, tmp_path / "trained", rules=rules)
    export_bitnet(tmp_path / "trained", tmp_path / "out")
    assert close(stock(tmp_path / "out"), logits(model))
    result = import_bitnet(tmp_path / "out", tmp_path / "back")
    assert result.modules == 11
    assert close(logits(load_trained(tmp_path / "back")[0]), logits(model))


def test_what_the_format_cannot_say(tmp_path, trained):
    target = tmp_path / "out"
    for name, options, message in (
        ("qwen2", {"method": Method(activation_bits=4)}, "4-bit activations"),
        ("mixtral", {}, "a SparseBitExperts has no place in the bitnet format"),
    ):
        save(trained(name, **options), tmp_path / "t", method=options.get("method") or Method())
        with pytest.raises(ConfigError, match=message):
            export_bitnet(tmp_path / "t", target)
    model = trained("qwen2")
    pack(model, tmp_path / "packed")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not a model of the bitnet format"):
        export_bitnet(tmp_path / "packed", tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    export_bitnet(tmp_path / "packed", target)
    with pytest.raises(ConfigError, match=r"exists; .*--overwrite"):
        export_bitnet(tmp_path / "packed", target)
    export_bitnet(tmp_path / "packed", target, overwrite=True)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt, which would be lost"):
        export_bitnet(tmp_path / "packed", target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"


def test_an_int8_head_is_stored_as_floats(tmp_path, trained, logits, stock):
    for architecture in ("qwen2", "qwen2-untied"):
        pack(trained(architecture), tmp_path / "packed", head="int8", overwrite=True)
        export_bitnet(tmp_path / "packed", tmp_path / "out", overwrite=True)
        ours = logits(load(tmp_path / "packed")[0])
        # Here the head's input is rounded too, there it is not.
        assert float((stock(tmp_path / "out") - ours).abs().max()) < 0.02 * float(ours.std())


def test_fused_matrices_need_one_scale(tmp_path, build):
    model = build("qwen2")
    convert(model, "6:8")
    layer = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = SparseBitLinear(
        layer, layer.pattern, layer.method, shard_sizes=(16, 16)
    )
    pack(model, tmp_path / "packed")
    with pytest.raises(ConfigError, match="one scale a layer, and this one fuses matrices"):
        export_bitnet(tmp_path / "packed", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_rows_that_four_does_not_divide(tmp_path):
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=42, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 4
    model = LlamaForCausalLM(config)
    convert(model, "dense")
    save(model, tmp_path / "t", pattern="dense")
    with pytest.raises(
        ConfigError, match=r"mlp\.gate_proj: .* four rows in a byte, and there are 42"
    ):
        export_bitnet(tmp_path / "t", tmp_path / "out")
    assert not (tmp_path / "out").exists()
