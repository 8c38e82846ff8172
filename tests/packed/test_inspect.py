"""What inspect measures, against the weights themselves."""

import json

import pytest
import torch
from torch import nn

from sparse_bitnet.core import CheckpointError, PackedFormatError, worst_group
from sparse_bitnet.packed.inspect import inspect
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train.config import SparsityConfig
from sparse_bitnet.train.export import save_trained


@pytest.mark.parametrize("storage", ["two-bit", "trits"])
def test_packed(tmp_path, trained, storage):
    model = trained("qwen2", "4:8", rules={"q_proj": "dense"})
    result = pack(model, tmp_path / "out", storage=storage)
    report = inspect(tmp_path / "out")
    assert report.kind == "packed" and report.storage == storage
    assert report.architecture == "Qwen2ForCausalLM" and report.activation_bits == [8]
    assert report.count == result.weights
    assert report.bits == pytest.approx(result.bits_per_weight)
    assert report.other_bytes == result.other_bytes
    assert report.float32_bytes == result.float32_bytes
    assert report.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    zeros = 0
    for weight in report.weights:
        module = model.get_submodule(weight.name.rpartition(".")[0])
        zeros += int((module.derived()[0] == 0).sum())
        assert weight.shape == tuple(module.weight.shape)
        assert weight.zeros == pytest.approx((module.derived()[0] == 0).float().mean().item())
        if "q_proj" in weight.name:
            most = worst_group(module.derived()[0], 8)
            assert weight.declared == "dense"
            assert weight.met == ("dense" if most == 8 else f"{most}:8")
        else:
            assert (weight.declared, weight.met) == ("4:8", "4:8")
    assert report.zeros == pytest.approx(zeros / report.count)


def test_sparser_than_declared(tmp_path, trained):
    """The pattern is measured, not believed."""
    pack(trained("llama", "2:8"), tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"2:8"', '"6:8"'))
    report = inspect(tmp_path / "out")
    assert {(weight.declared, weight.met) for weight in report.weights} == {("6:8", "2:8")}
    config.write_text(config.read_text().replace('"6:8"', '"1:8"'))
    with pytest.raises(PackedFormatError, match=r"2 non-zeros in the group from input .* is 1:8"):
        inspect(tmp_path / "out")


def test_experts(tmp_path, trained):
    pack(trained("mixtral"), tmp_path / "out")
    report = inspect(tmp_path / "out")
    shapes = {weight.name: weight.shape for weight in report.weights}
    assert shapes["model.layers.1.mlp.experts.gate_up_proj"] == (4, 96, 32)
    assert shapes["model.layers.1.mlp.experts.down_proj"] == (4, 32, 48)


@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
def test_trained(tmp_path, trained, kind):
    model = trained("qwen2", kind=kind)
    save_trained(model, None, tmp_path / "out", SparsityConfig(pattern="6:8", kind=kind))
    report = inspect(tmp_path / "out")
    assert report.kind == {"bitnet": "trained", "bf16": "trained bf16"}[kind]
    assert report.storage is None and report.bits == 32
    assert {weight.met for weight in report.weights} == {"6:8"}
    assert all(weight.zeros >= 0.25 for weight in report.weights)
    if kind == "bf16":
        assert report.activation_bits == [] and report.zeros == pytest.approx(0.25)
        assert "int8" not in report.summary()


def test_for_people_and_for_programs(pristine):
    report = inspect(pristine / "trits")
    summary = report.summary()
    assert "Qwen2ForCausalLM, packed, trits" in summary
    assert "any lossless code for the patterns met needs 1.546 bits a weight" in summary
    assert report.table().row_count == 14
    values = json.loads(json.dumps(report.as_dict()))
    assert values["weights"][0]["met"] == "6:8"
    assert values["least_bits"] == pytest.approx(1.5458, abs=1e-4)


def test_an_ordinary_directory(tmp_path, build):
    model = build("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    report = inspect(tmp_path)
    assert report.kind == "ordinary" and report.activation_bits == []
    assert "Qwen2ForCausalLM, ordinary" in report.summary()
    linears = {n: m.weight for n, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    assert {weight.name for weight in report.weights} == {f"model.{n}.weight" for n in linears}
    assert {weight.bits for weight in report.weights} == {16}
    for weight in report.weights:
        values = linears[weight.name.removeprefix("model.").removesuffix(".weight")]
        assert weight.declared == "dense" and weight.shape == tuple(values.shape)
        assert weight.zeros == pytest.approx((values == 0).float().mean().item())


def test_pickled_weights_count_too(tmp_path, build):
    model = build("qwen2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "training_args.bin").write_bytes(b"Trainer's")
    size = (tmp_path / "pytorch_model.bin").stat().st_size
    assert inspect(tmp_path).file_bytes == size


def test_refusals(tmp_path, packed):
    with pytest.raises(CheckpointError, match="holds no model"):
        inspect(tmp_path / "nothing")
    file = packed() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PackedFormatError, match="truncated"):
        inspect(file.parent)


def test_all_zero_matrices_are_said_by_pack_and_inspect(tmp_path, trained, capsys):
    model = trained("mixtral", "4:8")
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).weight.data.zero_()
    experts = "model.layers.1.mlp.experts"
    model.get_submodule(experts).gate_up_proj.data[3, 48:].zero_()
    zero = [f"{name}.weight", f"{experts}.gate_up_proj[3, 48:96]"]
    capsys.readouterr()
    assert sorted(pack(model, tmp_path / "packed").zero) == sorted(zero)
    assert "warning: 2 matrices are all zero" in capsys.readouterr().err
    save_trained(model, None, tmp_path / "trained", SparsityConfig(pattern="4:8"))
    for directory in ("packed", "trained"):
        report = inspect(tmp_path / directory)
        assert [n for weight in report.weights for n in weight.zero_matrices] == zero
        assert f"all zero    2 matrices: {', '.join(zero)}" in report.summary()
    assert "all zero" not in inspect(pack(trained("llama"), tmp_path / "other").directory).summary()
