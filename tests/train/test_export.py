"""A trained model as a directory, and back."""

import json
import re
import sys

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from sparse_bitnet.core import CheckpointError, ConfigError, Method, OutputError
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.nn import SparseBitLinear, SparseLinear, convert, master_weights
from sparse_bitnet.train.config import ModelConfig, SparsityConfig
from sparse_bitnet.train.dense import read_dense
from sparse_bitnet.train.export import (
    SIDE_FILE,
    load_trained,
    read_trained,
    save_trained,
)
from sparse_bitnet.train.model import build_model, convert_model
from sparse_bitnet.train.presets import preset_config
from tiny_models import preset_model, tiny_config

TOKENS = torch.arange(20).view(2, 10)


def trained(sparsity, shape=None):
    model = AutoModelForCausalLM.from_config(shape or preset_config("tiny", 32)).eval()
    convert_model(model, sparsity)
    return model


@pytest.mark.parametrize(
    "sparsity",
    [
        SparsityConfig(pattern="6:8"),
        SparsityConfig(pattern="2:4", kind="bf16"),
        SparsityConfig(
            pattern="4:8",
            method=Method(activation_bits=4, order="mask-then-quant"),
            rules={"q_proj": "skip", "down_proj": "2:4"},
            until={0.5: "dense"},
        ),
    ],
    ids=["published", "baseline", "ablation"],
)
def test_round_trip(tmp_path, sparsity):
    model = trained(sparsity)
    assert save_trained(model, None, tmp_path / "out", sparsity, {"steps": 3}) == tmp_path / "out"
    again, tokenizer = load_trained(tmp_path / "out")
    assert tokenizer is None
    assert not again.training
    for one in (again, AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert torch.equal(one(TOKENS).logits, model(TOKENS).logits)
    for ours, theirs in zip(master_weights(again), master_weights(model), strict=True):
        assert ours.name == theirs.name
        assert ours.pattern == theirs.pattern
        assert ours.module.method == theirs.module.method
        assert isinstance(ours.module, SparseLinear if sparsity.kind == "bf16" else SparseBitLinear)
    assert json.loads((tmp_path / "out" / "sparse_bitnet.json").read_text())["run"] == {"steps": 3}


def test_experts_round_trip(tmp_path):
    model = trained(SparsityConfig(), tiny_config("qwen2_moe"))
    save_trained(model, None, tmp_path / "out", SparsityConfig())
    again, _ = load_trained(tmp_path / "out")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)


def test_tokenizer_travels(tmp_path):
    tokenizer = train_bpe(["some text to learn from, some more text"], 300)
    model = preset_model(0, len(tokenizer))
    convert(model, "6:8")
    save_trained(model, tokenizer, tmp_path / "out", SparsityConfig())
    _, again = load_trained(tmp_path / "out")
    assert again.encode("more text") == tokenizer.encode("more text")


def test_refuses_what_is_not_ours(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        load_trained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is not a trained model: it has no sparse_bitnet"):
        load_trained(tmp_path)
    (tmp_path / "config.json").unlink()
    side = tmp_path / SIDE_FILE
    good = {"format": 1, "pattern": "6:8", "kind": "bitnet", "method": {}, "rules": {}, "run": {}}
    for change in (
        {"format": 2},
        {"pattern": "8:6"},
        {"kind": "int4"},
        {"method": {"order": "none"}},
        {"method": {"speed": 1}},
        {"rules": {"a": "b"}},
        {"rules": None},
    ):
        side.write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=r"damaged or foreign|reads format 1"):
            load_trained(tmp_path)
    for text in ("{", "[]", "null", json.dumps({"format": 1})):
        side.write_text(text)
        with pytest.raises(CheckpointError, match="damaged or foreign"):
            read_trained(tmp_path)
    side.write_text(json.dumps(good))
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no model"):
        load_trained(tmp_path)


def test_replaces_a_trained_model_and_nothing_else(tmp_path):
    model = trained(SparsityConfig())
    save_trained(model, None, tmp_path / "out", SparsityConfig())
    stale = tmp_path / "out" / "model-00001-of-00002.safetensors"
    stale.touch()
    save_trained(model, None, tmp_path / "out", SparsityConfig())
    assert not stale.exists()
    for kept in (tmp_path / "out" / "notes.txt", tmp_path / "out" / "polarization"):
        kept.mkdir()
        with pytest.raises(ConfigError, match=f"{kept.name}, which would be lost"):
            save_trained(model, None, tmp_path / "out", SparsityConfig())
        kept.rmdir()
    (tmp_path / "empty").mkdir()
    save_trained(model, None, tmp_path / "empty", SparsityConfig())
    with pytest.raises(ConfigError, match="exists and is not a trained model; give a new"):
        save_trained(model, None, tmp_path, SparsityConfig())
    with pytest.raises(ConfigError, match="exists and is not a trained model; give a new"):
        save_trained(model, None, tmp_path / "out" / SIDE_FILE, SparsityConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_a_gguf_file(tmp_path):
    (tmp_path / "m.GGUF").touch()
    with pytest.raises(CheckpointError, match=r"m\.GGUF is a GGUF file; .* import .*, and train"):
        load_trained(tmp_path / "m.GGUF")


def test_models_saved_over_a_trained_one(tmp_path):
    """Of the same weights, which checksums cannot tell: another pattern, and a dense model."""
    model = trained(SparsityConfig())
    save_trained(model, None, tmp_path, SparsityConfig())
    dense = read_dense(tmp_path)
    dense.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json of a dense one that was saved over"):
        load_trained(tmp_path)
    convert(dense, "2:4")
    dense.save_pretrained(tmp_path)
    assert torch.equal(load_trained(tmp_path)[0](TOKENS).logits, dense(TOKENS).logits)
    assert read_trained(tmp_path).pattern == "2:4"


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.serialize_file", full)
    with pytest.raises(OutputError, match="out cannot be written: No space left on device; make"):
        save_trained(trained(SparsityConfig()), None, tmp_path / "out", SparsityConfig())
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_refused(tmp_path):
    """By every reader: :func:`load_trained`, and training that starts from the directory."""
    save_trained(trained(SparsityConfig()), None, tmp_path / "out", SparsityConfig())
    weights = tmp_path / "out" / "model.safetensors"
    good = weights.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for position in (header, (header + len(good)) // 2, len(good) - 1):
        damaged = bytearray(good)
        damaged[position] ^= 1  # a weight like any other: nothing else could tell
        weights.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes and checksum"):
            load_trained(tmp_path / "out")
        source = ModelConfig(source=str(tmp_path / "out"))
        with pytest.raises(ConfigError, match="the weights were damaged or edited since"):
            build_model(source, vocab_size=32, seed=0, device=torch.device("cpu"))
    weights.write_bytes(good[:-100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_trained(tmp_path / "out")
    weights.write_bytes(good)
    (tmp_path / "out" / "more.safetensors").write_bytes(good)
    with pytest.raises(CheckpointError, match=r"'more\.safetensors' does not belong to it"):
        load_trained(tmp_path / "out")


def test_directories_without_checksums_load(tmp_path):
    """Those of version 0.1."""
    save_trained(trained(SparsityConfig()), None, tmp_path / "out", SparsityConfig())
    side = tmp_path / "out" / SIDE_FILE
    values = json.loads(side.read_text())
    assert list(values.pop("files")) == ["model.safetensors"]
    side.write_text(json.dumps(values))
    load_trained(tmp_path / "out")
    for foreign in ([], 1, "x", {"../model.safetensors": [1, 1]}, {"model.safetensors": None}):
        side.write_text(json.dumps(values | {"files": foreign}))
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_trained(tmp_path / "out")


def test_the_modules_that_were_converted_are(tmp_path, monkeypatch):
    """Also where another version would choose others."""
    model = trained(SparsityConfig())
    save_trained(model, None, tmp_path, SparsityConfig())
    module = sys.modules["sparse_bitnet.nn.convert"]  # the package has a function of that name
    monkeypatch.setattr(module, "ROUTERS", re.compile("k_proj"))
    again, _ = load_trained(tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_of_a_base_model_without_its_head(tmp_path):
    """What ``save_pretrained`` writes of it has names without the prefix; the head is tied."""
    model = preset_model(0, tie_word_embeddings=True)
    convert(model, "6:8")
    model.model.save_pretrained(tmp_path)
    again, _ = load_trained(tmp_path)
    assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)


DAMAGES = [{"pattern": "8:6"}, {"kind": 3}, {"method": 1}, {"rules": []}]
DAMAGES += [
    {"modules": one} for one in ({}, {"nowhere": None}, {"lm_head": "8:6"}, ["lm_head"], None)
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record(tmp_path, damage):
    model = preset_model(0)
    convert(model, "6:8")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] |= damage
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged or foreign"):
        load_trained(tmp_path)
