"""Damaged, edited and foreign packed directories: refused by our ``load``, and by transformers'."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_bitnet.core import PackedFormatError
from sparse_bitnet.packed.load import load, load_packed
from sparse_bitnet.packed.tensor_file import checksum_metadata

Q = "model.layers.0.self_attn.q_proj"
BOTH = pytest.mark.parametrize(
    "open_it", [load_packed, AutoModelForCausalLM.from_pretrained], ids=["ours", "transformers"]
)


@BOTH
@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_file(packed, open_it, keep):
    file = packed() / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(keep if isinstance(keep, int) else int(keep * size))
    with pytest.raises(PackedFormatError, match=r"truncated|header claims"):
        open_it(file.parent)


@BOTH
@pytest.mark.parametrize("name", [f"{Q}.weight", f"{Q}.weight_scale", "model.norm.weight"])
def test_flipped_bit(packed, open_it, name, read_header, write_header):
    file = packed() / "model.safetensors"
    header, data = read_header(file)
    data = bytearray(data)
    data[header[name]["data_offsets"][1] - 1] ^= 4
    write_header(file, header, bytes(data))
    with pytest.raises(PackedFormatError, match=f"tensor {name} is not what was written"):
        open_it(file.parent)


def edit_tensors(file, change):
    """Edit a file the way someone would who also corrects the checksums."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"} | checksum_metadata(tensors))


NORM = "model.layers.1.input_layernorm.weight"
inf, nan, one = float("inf"), float("nan"), torch.tensor([1])


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor(tensors[name])})


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{Q}.weight", lambda t: t | 3), f"{Q}.weight: row 0, byte 0 is .* no ternary weigh"),
        (put(f"{Q}.weight_scale", lambda t: -t), f"{Q}.weight_scale: a scale is not a positive"),
        (put(f"{Q}.weight_scale", lambda t: t / 0), f"tensor {Q}.weight_scale holds NaN or infin"),
        (put(NORM, lambda t: t.index_fill_(0, one, nan)), f"safetensors: tensor {NORM} holds NaN"),
        (put(NORM, lambda t: t.index_fill_(0, one, -inf)), f"tensor {NORM} holds NaN or infinity"),
        (put(NORM, lambda t: t.half() / 0), f"tensor {NORM} holds NaN or infinity"),
        (put(NORM, lambda t: t.double()), f"tensor {NORM} is torch.float64 .* asks for torch.flo"),
        (put(f"{Q}.weight", lambda t: t[:-1].clone()), "but config.json asks for torch.uint8"),
        (put(f"{Q}.weight", lambda t: t.to(torch.int8)), r"is torch.int8 \[32, 8\], but config"),
        (put(f"{Q}.weight", lambda t: t.float()), r"is torch.float32 \[32, 8\], but config"),
        (put(f"{Q}.weight_scale", lambda t: t.half()), r"is torch.float16 \[1\], but config"),
        (put("model.norm.weight", lambda t: t.int()), r"norm.weight is torch.int32 \[32\], but"),
        (lambda t: t.pop("model.norm.weight"), r"1 tensors of the model are missing.*model.norm"),
        (lambda t: t.pop(f"{Q}.weight"), f"1 tensors of the model are missing.*{Q}.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "tensor 'extra' belongs to no module of a Qwen"),
        (lambda t: t.clear(), r"tensors of the model are missing|there are 0 tensors"),
    ],
)
def test_edited_tensors(packed, open_it, change, message):
    file = packed() / "model.safetensors"
    edit_tensors(file, change)
    with pytest.raises(PackedFormatError, match=message):
        open_it(file.parent)


def test_weights_that_break_their_pattern_are_refused_when_used(packed, logits):
    """Well-formed bytes, corrected checksums: still never a silent drop in a sparse kernel."""
    file = packed() / "model.safetensors"
    edit_tensors(file, put(f"{Q}.weight", lambda t: t.fill_(0b10101010)))
    model = load_packed(file.parent)
    with pytest.raises(PackedFormatError, match=f"{Q}.weight: row 0 has 8 non-zeros.*is 6:8"):
        logits(model)


@BOTH
def test_foreign_file(packed, open_it, tmp_path, build):
    build("qwen2").save_pretrained(tmp_path / "plain")
    shutil.copy(tmp_path / "plain" / "model.safetensors", packed())
    with pytest.raises(PackedFormatError, match=r"is torch.float32 \[.*but config.json asks for"):
        open_it(tmp_path / "two-bit")


@BOTH
def test_file_without_checksums(packed, open_it):
    file = packed() / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    with pytest.raises(PackedFormatError, match=r"has no checksum; the file was not written by sp"):
        open_it(file.parent)


def quantization(**changes):
    return lambda config: config["quantization_config"].update(changes)


def module(**changes):
    return lambda config: config["quantization_config"]["modules"][Q].update(changes)


def layers(count):
    return lambda config: config.update(
        num_hidden_layers=count, layer_types=["full_attention"] * count
    )


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantization(format_version=3), r"has format version 3.*reads versions up to 2; run: pip"),
        (quantization(format_version=0), "format_version is 0; it should be a positive integer"),
        (quantization(format_version="1"), "format_version is 1; it should be a positive integer"),
        (quantization(storage="zip"), "storage is zip; it should be among"),
        (quantization(storage=["two-bit"]), "storage is .* it should be among"),
        (quantization(storage="trits"), r"is torch.uint8 \[32, 8\], but config.json asks for"),
        (quantization(modules={}), "modules is {}; it should name the packed modules"),
        (quantization(modules=[Q]), "modules is .*; it should name the packed modules"),
        (quantization(future=1), "future is present; only"),
        (module(pattern="9:8"), "pattern 9:8 is out of range"),
        (module(pattern="six"), "pattern 'six' is not understood"),
        (module(pattern=None), "is not understood"),
        (module(pattern="6:7"), r"in_features 32 is not a multiple of M = 7"),
        (module(activation_bits=16), "activation_bits is 16; it should be 8 or 4"),
        (module(activation_bits=[8]), "activation_bits is .*; it should be 8 or 4"),
        (
            module(segments=[16, 8]),
            r"shard sizes \(16, 8\) must be positive and sum to its 32 rows",
        ),
        (module(segments=[0, 32]), "segments is .*; it should be a list of row counts"),
        (module(segments="all"), "segments is all; it should be a list of row counts"),
        (module(extra=1), "it should have fields among"),
        (
            lambda c: c["quantization_config"]["modules"].update({"model.layers.9.q": {}}),
            r"modules\['model.layers.9.q'\] is {}; it should have fields among",
        ),
        (
            lambda c: c["quantization_config"]["modules"].update(
                {"model.layers.9.q": {"pattern": "6:8"}}
            ),
            "does not describe this Qwen2ForCausalLM: model.layers.9.q: the model has no such mod",
        ),
        (
            lambda c: c["quantization_config"]["modules"].update(
                {"model.norm": {"pattern": "6:8"}}
            ),
            "model.norm: these experts cannot be packed",
        ),
        (
            lambda c: c["quantization_config"]["modules"].pop(Q),
            f"tensor '{Q}.weight_scale' belongs to no module of a Qwen2ForCausalLM",
        ),
        (lambda c: c.update(hidden_size=64), "but config.json asks for"),
        (layers(3), r"12 tensors of the model are missing.*model.layers.2"),
        (layers(1), "model.layers.1.mlp.down_proj: the model has no such module"),
        (lambda c: c.update(intermediate_size=56), "but config.json asks for"),
    ],
)
def test_edited_config(packed, open_it, change, message, edit_json):
    directory = packed()
    edit_json(directory / "config.json", change)
    with pytest.raises(PackedFormatError, match=message):
        open_it(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, but there"),
        (lambda c: c.update(num_hidden_layers="2"), "num_hidden_layers is 2, but there"),
        (lambda c: c.update(hidden_size=2**62), "transformers cannot build this model"),
        (lambda c: c.update(hidden_act="fancy"), "transformers cannot build this model"),
        (lambda c: c.update(model_type="wonder"), "transformers cannot build this model"),
        (lambda c: c.update(model_type=None), "transformers cannot build this model"),
        (lambda c: c.pop("quantization_config"), r"no config.json of a packed Sparse-BitNet model"),
        (quantization(quant_method="gptq"), r"no config.json of a packed Sparse-BitNet model"),
    ],
)
def test_configs_that_only_our_door_can_refuse_in_our_words(packed, change, message, edit_json):
    directory = packed()
    edit_json(directory / "config.json", change)
    with pytest.raises(PackedFormatError, match=message):
        load_packed(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_damaged_json(packed, name, text):
    directory = packed("sharded")
    (directory / name).write_text(text)
    with pytest.raises(PackedFormatError, match=rf"{name}: not valid JSON"):
        load_packed(directory)


@BOTH
@pytest.mark.parametrize(
    "name",
    [
        "../two-bit/model.safetensors",
        "/etc/passwd",
        "/etc/model.safetensors",
        "../../model.safetensors",
        "config.json",
        "model.bin",
    ],
)
def test_index_that_names_other_places(packed, open_it, name, edit_json):
    packed("two-bit")
    directory = packed("sharded")
    edit_json(
        directory / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.norm.weight": name}),
    )
    with pytest.raises(PackedFormatError, match="is not the name of a weight file"):
        open_it(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("weight_map"), "there is no weight_map"),
        (lambda i: i.update(weight_map=[]), "there is no weight_map"),
        (lambda i: i.update(metadata=None), "there is no metadata"),
        (lambda i: i["weight_map"].update(x=5), "'5' is not the name of a weight file"),
        (lambda i: i["weight_map"].update(x=["a"]), "is not the name of a weight file"),
    ],
)
def test_edited_index(packed, change, message, edit_json):
    directory = packed("sharded")
    edit_json(directory / "model.safetensors.index.json", change)
    with pytest.raises(PackedFormatError, match=message):
        load_packed(directory)


@BOTH
def test_missing_shard(packed, open_it):
    directory = packed("sharded")
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        PackedFormatError, match=r"model-00002-of-00002.safetensors: cannot be read"
    ):
        open_it(directory)


@BOTH
def test_a_tensor_in_two_shards(packed, open_it):
    directory = packed("sharded")
    first, second = sorted(directory.glob("*.safetensors"))
    (name, tensor), *_ = load_file(first).items()
    edit_tensors(second, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(PackedFormatError, match=f"tensor {name} is there twice"):
        open_it(directory)


def test_no_weight_files(packed):
    directory = packed()
    (directory / "model.safetensors").unlink()
    with pytest.raises(PackedFormatError, match=r"neither model.safetensors nor model.safetensors"):
        load_packed(directory)


def test_pickles_are_never_read(packed):
    directory = packed()
    (directory / "model.safetensors").unlink()
    bomb = b"cos\nsystem\n(S'touch " + str(directory / "owned").encode() + b"'\ntR."
    (directory / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(PackedFormatError, match=r"neither model.safetensors"):
        load_packed(directory)
    (directory / "model.safetensors").write_bytes(bomb)
    with pytest.raises(PackedFormatError, match="not a safetensors file"):
        load_packed(directory)
    assert not (directory / "owned").exists()


def test_damaged_tokenizer(packed):
    directory = packed()
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(PackedFormatError, match="the tokenizer cannot be loaded"):
        load(directory)
