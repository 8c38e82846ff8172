"""Packing with an int8 head: stored, loaded, saved again, inspected, refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from sparse_bitnet.core import PackedFormatError
from sparse_bitnet.export.exportable import open_exportable
from sparse_bitnet.nn.int8_head import Int8Embedding, Int8Head, TiedInt8Head
from sparse_bitnet.packed.inspect import inspect
from sparse_bitnet.packed.load import load, load_packed
from sparse_bitnet.packed.tensor_file import checksum_metadata
from sparse_bitnet.packed.write import pack

EMBED = "model.embed_tokens"
TIED = pytest.mark.parametrize("kind", ["qwen2", "qwen2-untied"])


def rounded(model):
    """The trained model with the values that an int8 head has."""
    table = model.lm_head.weight.data
    step = table.abs().amax(-1, keepdim=True) / 127
    table[:] = (table / step).round() * step
    return model


@TIED
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_stored_and_loaded(tmp_path, kind, dtype, trained, logits):
    model = trained(kind)
    result = pack(model, tmp_path / "out", head="int8", dtype=dtype)
    tied = kind == "qwen2"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    table = EMBED if tied else "lm_head"
    assert stored[f"{table}.weight"].dtype == torch.int8
    assert stored[f"{table}.weight_scale"].shape == (300,)
    assert ("lm_head.weight" in stored) != tied
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(packed.lm_head, TiedInt8Head if tied else Int8Head)
    assert isinstance(packed.model.embed_tokens, Int8Embedding) == tied
    expected = logits(rounded(model))
    limit = 1e-3 if dtype is None else 0.05
    assert (logits(packed).float() - expected).abs().max() < limit * expected.abs().max()
    floats = {id(p): p.numel() for p in trained(kind).parameters()}
    assert result.float32_bytes == 4 * sum(floats.values())
    in_all = result.packed_bytes + result.other_bytes
    assert 0 < (tmp_path / "out" / "model.safetensors").stat().st_size - in_all < 20_000


@TIED
def test_saved_again_and_as_a_base_model(tmp_path, kind, trained, logits):
    pack(trained(kind), tmp_path / "one", head="int8")
    model = load_packed(tmp_path / "one")
    expected = logits(model)
    model.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert torch.equal(logits(load_packed(tmp_path / "two")), expected)
    one, two = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("one", "two"))
    assert one["quantization_config"] == two["quantization_config"]
    base = AutoModel.from_pretrained(tmp_path / "one")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_float_head_is_written_as_it_was(tmp_path, trained):
    """Older readers know version 1 only."""
    for head, version in (("float", 1), ("int8", 2)):
        pack(trained("qwen2"), tmp_path / head, head=head)
        found = json.loads((tmp_path / head / "config.json").read_text())["quantization_config"]
        assert found["format_version"] == version and ("int8" in found) == (head == "int8")


def test_generates_and_inspects(tmp_path, trained, tokenizer):
    for kind, said in (("qwen2", "int8, shared with the embedding"), ("qwen2-untied", "int8")):
        pack(trained(kind), tmp_path / kind, head="int8", tokenizer=tokenizer)
        report = inspect(tmp_path / kind)
        assert report.head == said and f"the head is {said}" in report.summary()
        assert inspect_float(tmp_path, trained, kind).other_parameters == report.other_parameters
        model, _ = load(tmp_path / kind, dtype="bfloat16")
        tokens = model.generate(torch.tensor([[1, 2]]), max_new_tokens=5, do_sample=False)
        assert tokens.shape[1] <= 7


def inspect_float(tmp_path, trained, kind):
    pack(trained(kind), tmp_path / "float", overwrite=True)
    report = inspect(tmp_path / "float")
    assert report.head.startswith("float32")
    return report


@TIED
def test_exports_read_the_rounded_values(tmp_path, kind, trained):
    model = trained(kind)
    pack(model, tmp_path / "out", head="int8")
    others = open_exportable(tmp_path / "out", "a test").others
    name = f"{EMBED if kind == 'qwen2' else 'lm_head'}.weight"
    assert not any(key.endswith("_scale") for key in others)
    assert torch.allclose(others[name], rounded(model).lm_head.weight, atol=1e-6)


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"} | checksum_metadata(tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{EMBED}.weight_scale"].neg_(), "weight_scale: a scale is not a positive"),
        (lambda t: t.pop(f"{EMBED}.weight_scale"), "1 tensors of the model are missing"),
        (
            lambda t: t.update({f"{EMBED}.weight": t[f"{EMBED}.weight"].float()}),
            r"is torch.float32 \[300, 32\], but config.json asks for torch.int8",
        ),
        (lambda t: t.update({"lm_head.weight": torch.ones(300, 32)}), "belongs to no module"),
    ],
)
def test_edited_tensors(tmp_path, trained, change, message):
    pack(trained("qwen2"), tmp_path / "out", head="int8")
    edit_tensors(tmp_path / "out" / "model.safetensors", change)
    with pytest.raises(PackedFormatError, match=message):
        load_packed(tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("lm_head", "int8 is lm_head; it should be a list of module names"),
        ([5], "int8 is .*; it should be a list"),
        (["model.nothing"], "model.nothing: the model has no such module"),
        (["model.norm"], "model.norm: a Qwen2RMSNorm cannot be int8"),
        (["model.layers.0.mlp.up_proj"], "up_proj: a PackedLinear cannot be int8"),
        ([], "weight_scale' belongs to no module"),
        ([EMBED], "lm_head.weight: it is tied to model.embed_tokens.weight, which is int8, and is"),
        (["lm_head"], "weight_scale' belongs to no module"),
        (["lm_head", EMBED], "missing"),
        ([EMBED, "lm_head", "lm_head"], "missing"),
    ],
)
def test_edited_config(tmp_path, trained, names, message, edit_json):
    pack(trained("qwen2"), tmp_path / "out", head="int8")
    edit_json(
        tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(int8=names)
    )
    with pytest.raises(PackedFormatError, match=message):
        load_packed(tmp_path / "out")
