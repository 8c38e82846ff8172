"""GGUF files, read back with the format's own reader: every weight, every name, every key."""

import sys
from enum import IntEnum

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, gguf_reader
from gguf.quants import dequantize
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from sparse_bitnet.core import CheckpointError, ConfigError, Method, MissingExtraError, WeightError
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.export.gguf.write import export_gguf
from sparse_bitnet.nn import SparseBitLinear, convert
from sparse_bitnet.nn.pack import derived_ternary
from sparse_bitnet.packed.load import load
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train import SparsityConfig, load_trained, save_trained
from tiny_models import randomize_vectors

TEXT = ["def main():\n    return the name of the file 1234\n"] * 30
CONFIGS = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "bitnet": BitNetConfig,
}
HEADS = 4, 2
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXT, 320)


@pytest.fixture
def save(tmp_path, bpe):
    """Write a random model of an architecture as a trained directory."""

    def write(kind, *, pattern="6:8", method=None, tokenizer=bpe, rules=None, **options):
        options = {
            "vocab_size": 323,  # three rows more than there are tokens
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS[0],
            "num_key_value_heads": HEADS[1],
            "max_position_embeddings": 128,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": None,
        } | options
        if kind != "qwen2":
            options = {"head_dim": 64} | options
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](**options))
        randomize_vectors(model)
        convert(model, pattern, method=method, rules=rules)
        sparsity = SparsityConfig(pattern=pattern, method=method or Method(), rules=rules or {})
        return save_trained(model, tokenizer, tmp_path / "trained", sparsity)

    return write


def name_there(name):
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, number, *rest, suffix = name.split(".")
    return f"blk.{number}.{LAYER['.'.join(rest)]}.{suffix}"


def permuted(tensor, heads):
    """Row r of a head's first half to 2r, of its second half to 2r + 1: one row after the other."""
    size = len(tensor) // heads
    out = torch.empty_like(tensor)
    for head in range(heads):
        for row in range(size // 2):
            out[head * size + 2 * row] = tensor[head * size + row]
            out[head * size + 2 * row + 1] = tensor[head * size + size // 2 + row]
    return out


def expected_tensors(directory, llama):
    """Name there → (exact values there, or values before rounding to the type)."""
    model, _ = load_trained(directory)
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        for _, (ternary, scale) in derived_ternary(module).items() if "proj" in name else ():
            tensors[f"{name}.weight"] = ternary * scale.half().float()
    for name in tensors if llama else ():
        for projection, heads in zip(("q_proj", "k_proj"), HEADS, strict=True):
            if projection in name:
                tensors[name] = permuted(tensors[name], heads)
    return {name_there(name): tensor for name, tensor in tensors.items()}


def dequantize_q2_0(data, shape):
    """As ggml's ``dequantize_row_q2_0``: per 64 weights d in fp16, then code j in bits 2·(j mod 4)
    of byte j div 4, and its value (code − 1)·d."""
    blocks = data.reshape(-1, 18)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    j = np.arange(64)
    codes = blocks[:, 2 + j // 4] >> (2 * (j % 4)) & 3
    return ((codes.astype(np.float32) - 1) * d).reshape(shape)


def read(path):
    # The package's reader refuses a type that it has no name for.
    known = IntEnum("Known", {t.name: t.value for t in Type} | {"Q2_0": 42})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_reader, "GGMLQuantizationType", known)
        patch.setitem(gguf_reader.GGML_QUANT_SIZES, 42, (64, 18))
        reader = GGUFReader(path)
    tensors = {}
    for t in reader.tensors:
        if t.tensor_type.name == "Q2_0":
            values = dequantize_q2_0(t.data, t.shape[::-1])
        else:
            values = dequantize(t.data, Type(t.tensor_type)).copy()
        tensors[t.name] = t.tensor_type, torch.from_numpy(values)
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("linears", ["tq2_0", "tq1_0", "q2_0"])
def test_every_weight_comes_back(save, tmp_path, kind, linears):
    biases = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    directory = save(kind, tie_word_embeddings=kind == "qwen2", **biases)
    out = tmp_path / "model.gguf"
    result = export_gguf(directory, out, linears=linears)
    found, keys = read(out)
    expected = expected_tensors(directory, llama=kind in ("llama", "mistral"))
    assert found.keys() == expected.keys()
    assert ("output.weight" in found) == (kind != "qwen2")
    for name, (type_there, values) in found.items():
        wanted = expected[name]
        if "embd" in name or name == "output.weight":
            assert type_there == Type.F16
            wanted = wanted.half().float()
        elif wanted.dim() == 1:
            assert type_there == Type.F32
        else:
            assert type_there.name == linears.upper(), name
        assert result.types[name] == type_there.name
        assert torch.equal(values, wanted), name
    assert result.weights == 2 * (256 * 256 * 3 + 3 * 256 * 512)
    assert result.bytes == out.stat().st_size
    assert float(result.lost[0].split("at most ")[1].split()[0]) <= 2**-11
    assert keys["general.file_type"] == {"tq2_0": 37, "tq1_0": 36, "q2_0": 41}[linears]
    assert f"{linears.upper()}: blk.*.attn_q.weight (2), " in str(result)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
def test_hyperparameters(save, tmp_path, kind):
    window = {"sliding_window": 64} if kind == "mistral" else {}
    result = export_gguf(save(kind, **window), tmp_path / "m.gguf")
    _, keys = read(tmp_path / "m.gguf")
    arch = "llama" if kind == "mistral" else kind
    assert keys["general.architecture"] == arch
    wanted = {
        "block_count": 2,
        "context_length": 64 if kind == "mistral" else 128,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "vocab_size": 323,
        "rope.dimension_count": 64,
        "rope.freq_base": 10000.0,
    }
    assert {name: keys[f"{arch}.{name}"] for name in wanted} == wanted
    assert keys[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6, rel=1e-6)
    assert ("window of 64" in str(result)) == (kind == "mistral")


def test_packed_and_trained_give_the_same_file(save, tmp_path):
    directory = save("qwen2")
    pack(directory, tmp_path / "packed", storage="trits")
    files = []
    for source in (directory, tmp_path / "packed"):
        export_gguf(source, tmp_path / "m.gguf", overwrite=True)
        found, _ = read(tmp_path / "m.gguf")
        files.append(found)
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name][1], files[1][name][1]) for name in files[0])


def test_embeddings_as_asked(save, tmp_path):
    directory = save("qwen2")
    model, _ = load_trained(directory)
    exact = model.get_input_embeddings().weight.detach()
    for kind, tolerance in (("f32", 0.0), ("f16", 2**-11), ("q8_0", 1 / 254 * 1.01)):
        export_gguf(directory, tmp_path / "m.gguf", embeddings=kind, overwrite=True)
        type_there, values = read(tmp_path / "m.gguf")[0]["token_embd.weight"]
        assert type_there.name.lower() == kind
        assert float((values - exact).abs().max()) <= tolerance * float(exact.abs().max())


def test_rows_that_no_block_fits(save, tmp_path):
    directory = save("qwen2", intermediate_size=384)
    with pytest.raises(ConfigError) as caught:
        export_gguf(directory, tmp_path / "m.gguf")
    for part in ("blocks of 256", "mlp.down_proj have 384", "2 of 14 layers", "--odd-rows f16"):
        assert part in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()
    result = export_gguf(directory, tmp_path / "m.gguf", odd_rows="f16")
    assert result.format == "GGUF TQ2_0"
    assert any("2 of 14 ternary layers" in line for line in result.lost)
    assert any("rounded to 8 bits by blocks" in line for line in result.lost)
    found, _ = read(tmp_path / "m.gguf")
    expected = expected_tensors(directory, llama=False)
    assert found["blk.1.ffn_down.weight"][0] == Type.F16
    assert torch.equal(found["blk.1.ffn_down.weight"][1], expected["blk.1.ffn_down.weight"])
    assert found["blk.1.ffn_up.weight"][0] == Type.TQ2_0


def test_q2_0_takes_rows_of_64(save, tmp_path):
    directory = save("llama", hidden_size=192, intermediate_size=576, head_dim=48)
    with pytest.raises(ConfigError, match=r"--linears q2_0, which newer .* blocks of 64$"):
        export_gguf(directory, tmp_path / "m.gguf")
    result = export_gguf(directory, tmp_path / "m.gguf", linears="q2_0")
    assert any("by blocks of 32 there" in line for line in result.lost)
    found, _ = read(tmp_path / "m.gguf")
    for name, wanted in expected_tensors(directory, llama=True).items():
        if name.startswith("blk") and wanted.dim() == 2:
            assert found[name][0].name == "Q2_0"
            assert torch.equal(found[name][1], wanted)
    odd = save("llama", intermediate_size=96)
    with pytest.raises(ConfigError, match=r"Q2_0 stores rows in blocks of 64.* have 96") as caught:
        export_gguf(odd, tmp_path / "n.gguf", linears="q2_0")
    assert "--linears" not in str(caught.value)


def test_nothing_that_a_block_fits(save, tmp_path):
    directory = save("qwen2", intermediate_size=384, hidden_size=128)
    result = export_gguf(directory, tmp_path / "m.gguf", odd_rows="f16")
    assert str(result).startswith(f"{tmp_path / 'm.gguf'}: GGUF F16, ")
    assert any("14 of 14 ternary layers" in line for line in result.lost)
    assert not any("8 bits" in line for line in result.lost)
    assert read(tmp_path / "m.gguf")[1]["general.file_type"] == 1  # mostly F16


def test_a_bias_that_the_graph_does_not_add_in_a_layer_left_alone(save, tmp_path):
    directory = save("qwen3", rules={"o_proj": "skip"}, attention_bias=True)
    with pytest.raises(ConfigError, match=r"o_proj has a bias, and it knows biases of q_proj"):
        export_gguf(directory, tmp_path / "m.gguf")


def test_a_llama_with_sub_norms(save, tmp_path):
    directory = save("bitnet", tie_word_embeddings=True, hidden_act="silu")
    export_gguf(directory, tmp_path / "m.gguf")
    found, keys = read(tmp_path / "m.gguf")
    expected = expected_tensors(directory, llama=False)
    assert found.keys() == expected.keys()
    assert {"blk.1.attn_sub_norm.weight", "blk.1.ffn_sub_norm.weight"} < found.keys()
    assert all(torch.equal(found[n][1], expected[n]) for n in found if n.startswith("blk"))
    assert keys["general.architecture"] == "bitnet"
    with pytest.raises(ConfigError, match=r"output head is .* and it knows the embedding as head"):
        export_gguf(save("bitnet", hidden_act="silu"), tmp_path / "n.gguf")


def test_llama3_frequencies(save, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    directory = save("llama", rope_parameters=rope)
    export_gguf(directory, tmp_path / "m.gguf")
    factors = read(tmp_path / "m.gguf")[0]["rope_freqs.weight"][1]
    model, _ = load_trained(directory)
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    scaled = model.model.rotary_emb.inv_freq
    assert torch.allclose(plain / factors, scaled, rtol=1e-6)
    assert len(factors.unique()) > 4


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mixtral", {}, "a SparseBitExperts has no place in GGUF"),
        ("qwen2", {"hidden_act": "relu"}, "its activation is relu, and it knows silu"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is yarn",
        ),
        ("qwen3", {"attention_bias": True}, "layers.0.self_attn.o_proj has a bias"),
        ("qwen2", {"method": Method(activation_bits=4)}, "4-bit activations"),
        ("qwen2", {"tokenizer": None}, "has no tokenizer"),
    ],
)
def test_what_llama_cpp_has_no_name_for(save, tmp_path, kind, options, message):
    directory = save(kind, **options)
    with pytest.raises(ConfigError, match=message):
        export_gguf(directory, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


@torch.no_grad()
def edited(directory, change):
    model, tokenizer = load_trained(directory)
    change(model.model)
    return save_trained(model, tokenizer, directory, SparsityConfig(pattern="6:8"))


def test_values_that_do_not_fit(save, tmp_path):
    directory = edited(save("qwen2"), lambda model: model.embed_tokens.weight[5, 7:8].fill_(1e6))
    with pytest.raises(WeightError, match=r"token_embd.weight: 1e.06 does not fit fp16"):
        export_gguf(directory, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))
    export_gguf(directory, tmp_path / "m.gguf", embeddings="f32")


def test_other_refusals(save, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError):
        export_gguf(tmp_path, tmp_path / "m.gguf")
    directory = save("qwen2")
    with pytest.raises(ConfigError, match="is a directory"):
        export_gguf(directory, tmp_path)
    for name, text, overwrite, message in (
        ("m.gguf", "GGUF", False, r"m.gguf exists; .*--overwrite"),
        ("notes.txt", "mine", True, "notes.txt exists and is not a GGUF file"),
        ("notes.gguf", "mine", True, "notes.gguf exists and is not a GGUF file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            export_gguf(directory, tmp_path / name, overwrite=overwrite)
        assert (tmp_path / name).read_text() == text
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparse-bitnet\[gguf\]'"):
        export_gguf(directory, tmp_path / "m.gguf")


def test_an_int8_head(save, tmp_path):
    directory = save("qwen2", tie_word_embeddings=True)
    packed = tmp_path / "packed"
    pack(directory, packed, head="int8")
    export_gguf(packed, tmp_path / "m.gguf", embeddings="f32")
    table = load(packed)[0].get_input_embeddings()
    found, _ = read(tmp_path / "m.gguf")
    assert torch.equal(found["token_embd.weight"][1], table.dequantize())
    assert "output.weight" not in found


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_fused_matrices_keep_their_scales(save, tmp_path, kind):
    """Row by row, and with rows that change places."""
    model, tokenizer = load_trained(save(kind))
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.weight[64:] *= 3
    fused = SparseBitLinear(layer, layer.pattern, layer.method, shard_sizes=(64, 192))
    model.model.layers[0].self_attn.q_proj = fused
    pack(model, tmp_path / "packed", tokenizer=tokenizer)
    export_gguf(tmp_path / "packed", tmp_path / "m.gguf")
    found = read(tmp_path / "m.gguf")[0]["blk.0.attn_q.weight"][1]
    ternary, scale, _ = fused.derived()
    rows = torch.cat([scale[:1].expand(64), scale[1:].expand(192)]).half().float()
    exact = ternary * rows.unsqueeze(-1)
    assert torch.equal(found, permuted(exact, HEADS[0]) if kind == "llama" else exact)


def test_the_change_of_a_small_scale_is_told(save, tmp_path):
    directory = edited(save("qwen2"), lambda model: model.layers[0].mlp.up_proj.weight.mul_(1e-3))
    lost = export_gguf(directory, tmp_path / "m.gguf").lost[0]
    assert 2**-11 < float(lost.split("at most ")[1].split()[0]) < 0.003


def test_an_all_zero_layer(save, tmp_path):
    directory = edited(save("qwen2"), lambda model: model.layers[0].mlp.up_proj.weight.zero_())
    export_gguf(directory, tmp_path / "m.gguf")
    values = read(tmp_path / "m.gguf")[0]["blk.0.ffn_up.weight"][1]
    assert np.count_nonzero(values) == 0
