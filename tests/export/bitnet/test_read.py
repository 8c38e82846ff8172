"""Checkpoints in the bitnet format, written as others write them, and damaged ones."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import pack_weights

import packed_models
from sparse_bitnet.core import ConfigError, DataError, PackedFormatError, PatternError, WeightError
from sparse_bitnet.data import prepare
from sparse_bitnet.export.bitnet.read import import_bitnet
from sparse_bitnet.export.bitnet.write import export_bitnet
from sparse_bitnet.packed.inspect import inspect
from sparse_bitnet.packed.load import load
from sparse_bitnet.packed.write import pack
from sparse_bitnet.serve.generate import generate_text
from sparse_bitnet.train import SparsityConfig, load_trained, save_trained, train
from sparse_bitnet.train.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from tiny_models import randomize_vectors

# Sums and scales differ in the last bits of float32. That may turn a rounding of an activation,
# and then a logit by one quantization step; not so with these few tokens.
TOLERANCE = 1e-5
TEXT = "def main():\n    return the name of the file\n" * 40


def close(one, two):
    return float((one - two).abs().max()) <= TOLERANCE


def bitnet_model(tied):
    """A small random BitNetForCausalLM: sub-norms, squared ReLU, biases."""
    torch.manual_seed(3)
    config = BitNetConfig(attention_bias=True, tie_word_embeddings=tied, **packed_models.SMALL)
    model = BitNetForCausalLM(config).eval()
    randomize_vectors(model)
    return model


def write_checkpoint(directory, linear_class, mode="offline", form="packed", tokenizer=None):
    """A checkpoint as others write it: by transformers' own packing, not by ours."""
    tied = linear_class == "bitlinear"
    model = bitnet_model(tied)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    generator = torch.Generator().manual_seed(4)
    for name, module in model.named_modules() if mode == "offline" else ():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        ternary = torch.randint(-1, 2, module.weight.shape, generator=generator)
        gamma = 0.02 + torch.rand(1, generator=generator) / 50
        packed = pack_weights(ternary.clone()) if form == "packed" else ternary.float()
        state[f"{name}.weight"] = packed
        state[f"{name}.weight_scale"] = 1 / gamma if linear_class == "bitlinear" else gamma
    directory.mkdir()
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    described = model.config.to_dict() | {
        "architectures": ["BitNetForCausalLM"],
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": linear_class,
            "quantization_mode": mode,
            "modules_to_not_convert": None,
        },
    }
    (directory / "config.json").write_text(json.dumps(described))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


FORMS = {
    "bitlinear": ("bitlinear", "offline", "packed"),
    "autobitlinear": ("autobitlinear", "offline", "packed"),
    "unpacked": ("autobitlinear", "offline", "plain"),
    "online": ("autobitlinear", "online", "plain"),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_imports_compute_what_stock_transformers_computes(tmp_path, stock, logits, tokenizer, form):
    source = write_checkpoint(tmp_path / "source", *FORMS[form])
    expected = stock(source)
    result = import_bitnet(source, tmp_path / "imported")
    assert (result.architecture, result.modules) == ("BitNetForCausalLM", 14)
    assert close(logits(load_trained(tmp_path / "imported")[0]), expected)
    pack(tmp_path / "imported", tmp_path / "packed", tokenizer=tokenizer)
    assert close(logits(load(tmp_path / "packed")[0]), expected)
    export_bitnet(tmp_path / "packed", tmp_path / "again")
    assert close(stock(tmp_path / "again"), expected)


def test_masked_finetuned_packed_and_run(tmp_path, tokenizer, logits):
    source = write_checkpoint(tmp_path / "source", *FORMS["autobitlinear"], tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text(TEXT)
    text = f"text:{tmp_path / 'text.txt'}"
    import_bitnet(source, tmp_path / "m", pattern="6:8")
    report = inspect(tmp_path / "m")
    assert {weight.met for weight in report.weights} <= {"6:8", "5:8"}

    prepare(text, tmp_path / "data", tokenizer=tmp_path / "m", validation=0)
    config = TrainConfig(
        data=DataConfig(path=str(tmp_path / "data"), sequence_length=16, batch_size=2),
        model=ModelConfig(source=str(tmp_path / "m")),
        sparsity=SparsityConfig("6:8"),
        schedule=ScheduleConfig(steps=12),
        run=RunConfig(directory=str(tmp_path / "run"), precision="fp32", device="cpu"),
    )
    tuned = train(config)
    pack(tuned.model_directory, tmp_path / "packed")
    model, loaded = load(tmp_path / "packed")
    assert generate_text(model, loaded, "def main", 4)
    before, _ = load_trained(tmp_path / "m")
    assert not close(logits(model), logits(before))


def test_a_pattern_that_is_kept_changes_nothing(tmp_path, trained, logits):
    model = trained("qwen2")
    save_trained(model, None, tmp_path / "t", SparsityConfig(pattern="6:8"))
    export_bitnet(tmp_path / "t", tmp_path / "out", linear_class="autobitlinear")
    result = import_bitnet(tmp_path / "out", tmp_path / "back", pattern="6:8")
    assert result.pattern == "6:8"
    assert close(logits(load_trained(tmp_path / "back")[0]), logits(model))
    with pytest.raises(PatternError, match="3:5"):
        import_bitnet(tmp_path / "out", tmp_path / "odd", pattern="3:5")
    assert not (tmp_path / "odd").exists()


def edit_config(directory, **values):
    path = directory / "config.json"
    described = json.loads(path.read_text())
    for key, value in values.items():
        inner = described["quantization_config"] if key in QUANTIZATION else described
        inner[key] = value
    path.write_text(json.dumps(described))


QUANTIZATION = {
    "quant_method",
    "linear_class",
    "quantization_mode",
    "use_rms_norm",
    "modules_to_not_convert",
}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"quant_method": "gptq"}, ConfigError, "no checkpoint of quant_method bitnet"),
        ({"linear_class": "x"}, ConfigError, "linear_class 'x' .* are not known"),
        ({"quantization_mode": "later"}, ConfigError, "'later' are not known"),
        ({"use_rms_norm": True}, ConfigError, "use_rms_norm puts a norm into every linear"),
        ({"modules_to_not_convert": []}, ConfigError, "the output head is ternary"),
        ({"modules_to_not_convert": "lm_head"}, PackedFormatError, "is lm_head, no list"),
        (
            {"modules_to_not_convert": ["(a+)+$"]},
            PackedFormatError,
            "where names of modules are expected",
        ),
        (
            {"modules_to_not_convert": ["lm_head", "q_proj"]},
            PackedFormatError,
            "q_proj.weight_scale' belongs to no part",
        ),
        ({"quantization_mode": "online"}, PackedFormatError, "where floats are expected"),
        ({"_attn_implementation": "somebody/kernel"}, PackedFormatError, "somebody/kernel"),
        ({"model_type": "nobody"}, ConfigError, "no architecture 'nobody'"),
        ({"model_type": ["llama"]}, ConfigError, "no architecture"),
        ({"num_hidden_layers": 10**9}, PackedFormatError, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 3}, PackedFormatError, "Missing.*model.layers.2"),
        ({"num_hidden_layers": 1}, PackedFormatError, "layers.1.* belongs to no part of"),
        ({"hidden_size": 2**40}, PackedFormatError, "config.json: transformers cannot build it"),
        ({"hidden_size": -8}, PackedFormatError, "config.json: .* negative dimension"),
        ({"vocab_size": 2**33}, PackedFormatError, "size mismatch.*8589934592, 32"),
        (
            {"model_type": "llama"},
            PackedFormatError,
            "sub_norm.weight' belongs to no part of a Llama",
        ),
    ],
)
def test_configs_that_do_not_fit(tmp_path, values, error, message):
    source = write_checkpoint(tmp_path / "s", *FORMS["autobitlinear"])
    edit_config(source, **values)
    with pytest.raises(error, match=f"(?s){message}"):
        import_bitnet(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit(tmp_path):
    source = write_checkpoint(tmp_path / "s", *FORMS["autobitlinear"])
    path = source / "model.safetensors"
    clean = load_file(path)
    up, scale = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale"
    norm, huge = "model.norm.weight", torch.full((32,), 1e300, dtype=torch.float64)
    for change, error, message in (
        ({up: None}, PackedFormatError, f"Missing.*{up}"),
        ({scale: None}, PackedFormatError, f"{scale} is missing"),
        ({scale: torch.zeros(1)}, PackedFormatError, "is 0.0, which is the scale of no"),
        ({scale: torch.tensor([float("nan")])}, PackedFormatError, "is nan, which is the scale"),
        ({scale: -torch.ones(1)}, PackedFormatError, "is -1.0"),
        ({scale: torch.ones(48)}, PackedFormatError, r"\[48\] where one float is expected"),
        ({scale: torch.ones(1, dtype=torch.int32)}, PackedFormatError, "where one float is"),
        ({up: torch.zeros(48, 32, dtype=torch.int64)}, PackedFormatError, "is not ternary"),
        ({up: clean[up].repeat(4, 1)}, PackedFormatError, f"size mismatch for {up}"),
        ({up: torch.full_like(clean[up], 255)}, PackedFormatError, "stands for no ternary"),
        ({up: torch.full((48, 32), 0.5)}, PackedFormatError, "is not ternary"),
        ({norm: torch.full((32,), float("inf"))}, WeightError, "model.norm.weight: 32 of 32"),
        ({norm: huge}, WeightError, "model.norm.weight: 32 of 32"),
        ({norm: torch.ones(32, dtype=torch.int32)}, PackedFormatError, "where floats are expected"),
        ({"extra": torch.ones(1)}, PackedFormatError, "'extra' belongs to no part"),
    ):
        state = {n: t for n, t in (clean | change).items() if t is not None}
        save_file(state, path, {"format": "pt"})
        with pytest.raises(error, match=f"(?s){message}"):
            import_bitnet(source, tmp_path / "out")
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file(clean, source / first, {"format": "pt"})
    save_file({norm: torch.ones(32)}, source / second, {"format": "pt"})
    path.unlink()
    index = {"metadata": {}, "weight_map": {up: first, norm: second}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PackedFormatError, match=f"{norm} is in another file too"):
        import_bitnet(source, tmp_path / "out")
    (source / "model.safetensors.index.json").unlink()
    state = clean | {"model.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state, path, {"format": "pt"})
    import_bitnet(source, tmp_path / "out")  # older checkpoints have it


def test_files_that_are_damaged_or_dangerous(tmp_path, tokenizer):
    source = write_checkpoint(tmp_path / "s", *FORMS["bitlinear"], tokenizer=tokenizer)
    path = source / "model.safetensors"
    data = path.read_bytes()
    for damaged, message in (
        (data[: len(data) // 2], "truncated, damaged or not"),
        (struct.pack("<Q", 2**62) + data[8:], "header too large"),
        (b"", "header too small"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(PackedFormatError, match=message):
            import_bitnet(source, tmp_path / "out")
    path.rename(source / "pytorch_model.bin")
    with pytest.raises(PackedFormatError, match=r"neither model\.safetensors nor"):
        import_bitnet(source, tmp_path / "out")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PackedFormatError, match="is not the name of a weight file"):
        import_bitnet(source, tmp_path / "out")
    (source / "model.safetensors.index.json").unlink()
    path.write_bytes(data)
    (source / "evil.py").write_text("raise SystemExit('code was run')")
    edit_config(source, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"})
    import_bitnet(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    described = json.loads((source / "tokenizer_config.json").read_text())
    described["auto_map"] = {"AutoTokenizer": ["evil.T", "evil.T"]}
    (source / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="this tokenizer is code, which is not run"):
        import_bitnet(source, tmp_path / "out")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        import_bitnet(source, tmp_path / "out")
    (source / "tokenizer_config.json").unlink()
    os.mkfifo(source / "notes")
    with pytest.raises(PackedFormatError, match="notes is a pipe or a device"):
        import_bitnet(source, tmp_path / "out")
    (source / "notes").unlink()
    (source / "generation_config.json").write_text("[")
    with pytest.raises(PackedFormatError, match="not valid JSON"):
        import_bitnet(source, tmp_path / "out")


def test_generation_settings(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "s", *FORMS["bitlinear"])
    path = source / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, 4], "do_sample": True, "temperature": 0.6}))
    import_bitnet(source, tmp_path / "out")
    settings = load_trained(tmp_path / "out")[0].generation_config
    assert settings.eos_token_id == [3, 4] and settings.temperature == 0.6
    path.write_text(json.dumps({"eos_token_id": 3, "temperature": 0.6}))  # no sampling
    import_bitnet(source, tmp_path / "out", overwrite=True)
    assert "generation_config.json is left out" in capsys.readouterr().err
    assert load_trained(tmp_path / "out")[0].generation_config.eos_token_id == 0


def test_other_refusals(tmp_path):
    source = write_checkpoint(tmp_path / "s", *FORMS["bitlinear"])
    with pytest.raises(ConfigError, match="exists and is not a trained model"):
        import_bitnet(source, source, overwrite=True)
    import_bitnet(source, tmp_path / "kept")
    with pytest.raises(ConfigError, match=r"exists; .*--overwrite"):
        import_bitnet(source, tmp_path / "kept")
    import_bitnet(source, tmp_path / "kept", overwrite=True)
    (tmp_path / "kept" / "notes").mkdir()
    with pytest.raises(ConfigError, match="holds notes, which would be lost"):
        import_bitnet(source, tmp_path / "kept", overwrite=True)
    with pytest.raises(PackedFormatError, match=r"holds no model: there is no config\.json"):
        import_bitnet(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
