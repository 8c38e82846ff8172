"""The bitnet format of transformers, judged by stock transformers in a process without us."""

import json
import re
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import pack_weights, unpack_weights

from sparse_bitnet.core import (
    ConfigError,
    DataError,
    Method,
    PackedFormatError,
    PatternError,
    WeightError,
)
from sparse_bitnet.data import prepare
from sparse_bitnet.deploy.generate import generate_text
from sparse_bitnet.deploy.hf_bitnet import export_bitnet
from sparse_bitnet.deploy.hf_bitnet_import import import_bitnet
from sparse_bitnet.deploy.inspect import inspect
from sparse_bitnet.deploy.packing import pack
from sparse_bitnet.deploy.pretrained import load
from sparse_bitnet.formats import row_quarters
from sparse_bitnet.nn import SparseBitLinear
from sparse_bitnet.train import SparsityConfig, load_trained, save_trained, train
from sparse_bitnet.train.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

CLASSES = ["bitlinear", "autobitlinear"]
# Sums and scales differ in the last bits of float32. That may turn a rounding of an activation,
# and then a logit by one quantization step; not so with these few tokens.
TOLERANCE = 1e-5
STOCK = """
import os, sys
os.environ["TORCHDYNAMO_DISABLE"] = "1"
import torch
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    directory, out = line.split()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        torch.save(model(torch.randint(0, 300, (2, 20))).logits, out)
    assert "sparse_bitnet" not in sys.modules
    print("done", flush=True)
"""
TEXT = "def main():\n    return the name of the file\n" * 40


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Logits that stock transformers computes from a directory, in a process of its own."""
    out = tmp_path_factory.mktemp("stock") / "logits.pt"
    process = subprocess.Popen(
        [sys.executable, "-c", STOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(directory):
        process.stdin.write(f"{directory} {out}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        return torch.load(out, weights_only=True)

    yield run
    process.stdin.close()
    process.wait()


def save(model, directory, tokenizer=None, **sparsity):
    return save_trained(
        model, tokenizer, directory, SparsityConfig(**{"pattern": "6:8"} | sparsity)
    )


def close(one, two):
    return float((one - two).abs().max()) <= TOLERANCE


# ── formats/row_quarters.py


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_bytes_are_those_of_transformers(quarter, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    ternary = torch.randint(-1, 2, (4 * quarter, columns), generator=generator).to(torch.int8)
    before = ternary.clone()
    packed = row_quarters.pack(ternary)
    assert torch.equal(ternary, before)
    assert torch.equal(row_quarters.unpack(packed), ternary)
    if quarter:
        assert torch.equal(packed, pack_weights(ternary.clone()))
        assert torch.equal(unpack_weights.__wrapped__(packed, torch.int8), ternary)


def test_bytes_that_are_refused():
    with pytest.raises(ConfigError, match="layer: 6 rows are not a multiple of 4"):
        row_quarters.pack(torch.zeros(6, 2, dtype=torch.int8), "layer")
    with pytest.raises(WeightError, match="row 1 holds 2"):
        row_quarters.pack(torch.tensor([[0], [2], [0], [0]], dtype=torch.int8))
    with pytest.raises(PackedFormatError, match="layer: row 1, byte 0 is 12"):
        row_quarters.unpack(torch.tensor([[0], [12]], dtype=torch.uint8), "layer")
    with pytest.raises(PackedFormatError):
        row_quarters.unpack(torch.zeros(2, 2))


# ── export


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


def test_layers_left_in_full_precision(tmp_path, build, logits, stock):
    from sparse_bitnet.nn import convert

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
        export_bitnet(tmp_path / "packed", tmp_path / "full")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    export_bitnet(tmp_path / "packed", target)
    export_bitnet(tmp_path / "packed", target)  # one of its own is replaced


def test_rows_that_four_does_not_divide(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparse_bitnet.nn import convert

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


# ── import


def bitnet_model(tied):
    """A small random BitNetForCausalLM: sub-norms, squared ReLU, biases."""
    torch.manual_seed(3)
    config = BitNetConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = BitNetForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
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


def test_masked_measured_finetuned_packed_and_run(tmp_path, tokenizer, logits):
    source = write_checkpoint(tmp_path / "source", *FORMS["autobitlinear"], tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text(TEXT)
    text = f"text:{tmp_path / 'text.txt'}"
    result = import_bitnet(source, tmp_path / "m", pattern="6:8", text=text, window=32)
    assert result.one_shot is not None
    assert result.one_shot.before.loss != result.one_shot.after.loss
    assert re.search(r"perplexity \d+\.\d\d before, \d+\.\d\d with 6:8 in one shot", str(result))
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
    assert tuned.model_directory is not None
    pack(tuned.model_directory, tmp_path / "packed")
    model, loaded = load(tmp_path / "packed")
    assert generate_text(model, loaded, "def main", 4)
    before, _ = load_trained(tmp_path / "m")
    assert not close(logits(model), logits(before))


def test_a_pattern_that_is_kept_changes_nothing(tmp_path, trained, logits):
    model = trained("qwen2")
    save(model, tmp_path / "t")
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
        ({"modules_to_not_convert": []}, ConfigError, "output head lm_head is ternary"),
        ({"modules_to_not_convert": "lm_head"}, PackedFormatError, "is lm_head, no list"),
        (
            {"modules_to_not_convert": ["(a+)+$"]},
            PackedFormatError,
            "where names of modules are expected",
        ),
        (
            {"modules_to_not_convert": ["lm_head", "q_proj"]},
            PackedFormatError,
            "weight_scale' belongs to no part",
        ),
        ({"quantization_mode": "online"}, PackedFormatError, "weight_scale' belongs to no part"),
        ({"_attn_implementation": "somebody/kernel"}, PackedFormatError, "somebody/kernel"),
        ({"model_type": "nobody"}, ConfigError, "no architecture 'nobody'"),
        ({"model_type": ["llama"]}, ConfigError, "no architecture"),
        ({"num_hidden_layers": 10**9}, PackedFormatError, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 3}, PackedFormatError, "tensors are missing, model.layers.2"),
        ({"num_hidden_layers": 1}, PackedFormatError, "belongs to no part of a BitNetForCausalLM"),
        ({"hidden_size": 2**40}, PackedFormatError, "asks for floats|cannot read it"),
        ({"hidden_size": -8}, PackedFormatError, "transformers cannot read it"),
        ({"vocab_size": 2**33}, PackedFormatError, r"asks for floats \[8589934592, 32\]"),
        ({"model_type": "llama"}, PackedFormatError, "sub_norm.weight' belongs to no part"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, values, error, message):
    source = write_checkpoint(tmp_path / "s", *FORMS["autobitlinear"])
    edit_config(source, **values)
    with pytest.raises(error, match=message):
        import_bitnet(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit(tmp_path):
    source = write_checkpoint(tmp_path / "s", *FORMS["autobitlinear"])
    path = source / "model.safetensors"
    clean = load_file(path)
    up, scale = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale"
    norm = "model.norm.weight"
    for change, error, message in (
        ({up: None}, PackedFormatError, f"1 tensors are missing, {up}"),
        ({scale: None}, PackedFormatError, f"1 tensors are missing, {scale}"),
        ({scale: torch.zeros(1)}, PackedFormatError, "is 0.0, which is the scale of no"),
        ({scale: torch.tensor([float("nan")])}, PackedFormatError, "is nan, which is the scale"),
        ({scale: -torch.ones(1)}, PackedFormatError, "is -1.0"),
        ({scale: torch.ones(48)}, PackedFormatError, "asks for one float"),
        ({up: clean[up].repeat(4, 1)}, PackedFormatError, r"uint8 \[48, 32\].* asks for"),
        ({up: torch.full_like(clean[up], 255)}, PackedFormatError, "stands for no ternary"),
        ({up: torch.full((48, 32), 0.5)}, PackedFormatError, "is not ternary"),
        ({norm: torch.full((32,), float("inf"))}, WeightError, "model.norm.weight: 32 of 32"),
        ({norm: torch.ones(32, dtype=torch.int32)}, PackedFormatError, "asks for floats"),
        ({"extra": torch.ones(1)}, PackedFormatError, "'extra' belongs to no part"),
    ):
        state = {n: t for n, t in (clean | change).items() if t is not None}
        save_file(state, path, {"format": "pt"})
        with pytest.raises(error, match=message):
            import_bitnet(source, tmp_path / "out")
    state = clean | {"model.rotary_emb.inv_freq": torch.ones(4)}
    save_file(state, path, {"format": "pt"})
    import_bitnet(source, tmp_path / "out")  # older checkpoints have it


def test_files_that_are_damaged_or_dangerous(tmp_path, tokenizer):
    source = write_checkpoint(tmp_path / "s", *FORMS["bitlinear"], tokenizer=tokenizer)
    path = source / "model.safetensors"
    data = path.read_bytes()
    for damaged, message in (
        (data[: len(data) // 2], "truncated or was edited"),
        (struct.pack("<Q", 2**62) + data[8:], "the header claims"),
        (b"", "header claims"),
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
    import_bitnet(source, tmp_path / "out")
    assert "generation_config.json is left out" in capsys.readouterr().err
    assert load_trained(tmp_path / "out")[0].generation_config.eos_token_id == 0


def test_other_refusals(tmp_path):
    source = write_checkpoint(tmp_path / "s", *FORMS["bitlinear"])
    with pytest.raises(ConfigError, match="has no tokenizer to read a text with"):
        import_bitnet(source, tmp_path / "out", text="stdlib")
    with pytest.raises(ConfigError, match="exists and is not a trained model"):
        import_bitnet(source, source)
    with pytest.raises(PackedFormatError, match="cannot be read"):
        import_bitnet(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
