"""Weight analysis of checkpoints, against figures worked out by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.core import CheckpointError, PatternError, WeightError
from sparse_bitnet.core import polarization as measure
from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.nn import convert, master_weights
from sparse_bitnet.study.polarization import Analysis, analyse, as_dict, early_and_late, pool
from sparse_bitnet.train import train
from sparse_bitnet.train.recipe import config_from_dict


def test_hand_computed_statistics(tmp_path: Path) -> None:
    # γ = mean|w| = (8·1 + 8·0.2)/16 = 0.6; |w|/γ is 1.667 or 0.333, so half are zeros. Under 4:8
    # each group of one row loses its four 0.2: threshold 0.333 γ, inside the dead zone.
    row = [1.0, -1.0, 0.2, -0.2, 1.0, 0.2, -1.0, 0.2]
    weight = torch.tensor([row, row])
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, tmp_path / "model.safetensors")
    analysis = analyse(tmp_path, pattern="4:8")
    result = analysis.values
    heading, line, total, scales = str(analysis).splitlines()
    assert scales == ("γ: one for each matrix, whatever is fused into it: there is no config.json")
    assert heading.split() == ["matrix", "shape", "pattern", "zeros", "lose", "nothing", "kurtosis"]
    assert line.split()[:5] == [
        "model.layers.0.mlp.up_proj.weight",
        "2×8",
        "4:8",
        "50.0%",
        "100.0%",
    ]
    assert total.split()[:3] == ["all", "50.0%", "100.0%"]
    (layer,) = result["layers"]
    assert layer["shard_sizes"] == []
    assert layer["zeros_before_mask"] == 0.5
    assert layer["dead_zone_groups"] == 1.0
    edges = layer["edges"]
    first = max(i for i in range(80) if edges[i] <= 0.2 / 0.6)
    second = max(i for i in range(80) if edges[i] <= 1.0 / 0.6)
    assert layer["magnitudes"][first] == 0.5
    assert layer["magnitudes"][second] == 0.5
    assert layer["thresholds"][first] == 1.0
    # Signed values ±1 and ±0.2 around a mean of 0.05: fourth moment over squared variance.
    centred = [w - sum(row) / 8 for w in row]
    kurtosis = (sum(c**4 for c in centred) / 8) / (sum(c**2 for c in centred) / 8) ** 2
    assert layer["kurtosis"] == pytest.approx(kurtosis, abs=1e-4)
    written = json.loads((tmp_path / "polarization" / "polarization.json").read_text())
    assert written == result
    assert (tmp_path / "polarization" / "polarization.png").stat().st_size > 1000
    # A sparser pattern cuts into the large weights: threshold 1.667 γ, outside the dead zone.
    assert analyse(tmp_path, pattern="2:8").values["overall"]["dead_zone_groups"] == 0.0


def test_pool_weighs_by_size() -> None:
    small = measure(torch.tensor([[1.0, 1.0]]), Pattern(1, 1))
    large = measure(torch.tensor([[2.0, 0.0, 2.0, 0.0, 2.0, 0.0]]), Pattern(1, 1))
    both = pool([(small, 2), (large, 6)])
    assert both.zeros_before_mask == pytest.approx(3 / 8)
    assert sum(both.magnitudes) == pytest.approx(1)


def test_early_and_late_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"proj": nn.Linear(16, 8, bias=False)}) for _ in range(3)
    )
    with torch.no_grad():
        model.layers[0]["proj"].weight.fill_(1.0)
        model.layers[2]["proj"].weight.copy_(torch.eye(8, 16))
    convert(model, "dense", kind="bitnet")
    found = {one["position"]: one for one in early_and_late(model)}
    assert set(found) == {"early", "late", "all"}
    assert found["early"]["zeros_before_mask"] == 0.0
    assert found["late"]["zeros_before_mask"] == pytest.approx(15 / 16)
    assert found["all"]["pattern"] == "6:8"  # dense weights are compared by 6:8


def test_embeddings_head_norms_and_routers_are_left_out(tmp_path: Path) -> None:
    square = torch.randn(8, 8)
    names = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ]
    tensors = {name: square.clone() for name in names}
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(8)
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.randn(2, 8, 8)
    save_file(tensors, tmp_path / "model.safetensors")
    found = [layer["name"] for layer in analyse(tmp_path, tmp_path / "out").values["layers"]]
    assert found == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.gate_proj.weight",
    ]
    assert (tmp_path / "out" / "polarization.json").is_file()


def test_layers_are_in_natural_order_and_one_file_is_enough(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2, 10)]
    file = tmp_path / "weights.safetensors"
    save_file({name: torch.randn(4, 8).half() for name in names}, file)
    result = analyse(file).values
    assert [layer["name"] for layer in result["layers"]] == names
    assert (tmp_path / "polarization" / "layers.png").is_file()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        analyse(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors; give a trained run"):
        analyse(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        analyse(tmp_path)
    save_file({"a.weight": torch.zeros(4, 8, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a packed model has no master weights"):
        analyse(tmp_path)
    save_file({"a.weight": torch.zeros(0, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no floating-point matrix"):
        analyse(tmp_path)
    save_file({"a.weight": torch.full((4, 8), torch.nan)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"a\.weight: 32 of 32 values"):
        analyse(tmp_path)
    save_file({"a.weight": torch.randn(4, 6)}, tmp_path / "model.safetensors")
    with pytest.raises(PatternError, match=r"^a\.weight: in_features 6 is not a multiple of M = 8"):
        analyse(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        analyse(tmp_path)


def names(directory: Path) -> list[str]:
    return [layer["name"] for layer in analyse(directory).values["layers"]]


def test_of_a_sharded_model_the_files_that_its_index_lists(tmp_path: Path) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    matrices = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    for shard, name in zip(shards, matrices, strict=True):
        save_file({name: torch.randn(4, 8)}, tmp_path / shard)
    # The same weights under the names of another program, as some repositories have them.
    save_file({"layers.0.w1.weight": torch.randn(4, 8)}, tmp_path / "consolidated.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip(matrices, shards, strict=True))}))
    assert names(tmp_path) == matrices
    (tmp_path / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 2 files .* model-00002-of-00002"):
        analyse(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged: 'weight_map'"):
        analyse(tmp_path)
    index.unlink()
    save_file({matrices[0]: torch.randn(4, 8)}, tmp_path / "model.safetensors")
    assert names(tmp_path) == matrices[:1]


def test_a_packed_model_with_some_matrices_unpacked_is_refused(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.down_proj.weight": torch.zeros(4, 2, dtype=torch.uint8),
        "model.layers.0.mlp.up_proj.weight": torch.randn(4, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj.* is of integers \(U8\); a packed model"):
        analyse(tmp_path)


def test_what_rules_decided_in_training_counts(tmp_path: Path, toy_tokens: Path) -> None:
    """A run and its checkpoint give the same; the optimizer's moments are no weights."""
    rules = {"down_proj": "2:4", "q_proj": "skip"}
    run = {"directory": str(tmp_path / "run"), "checkpoint_every": 2}
    sections = {
        "data": {"path": str(toy_tokens), "sequence_length": 16, "batch_size": 2},
        "model": {"source": "tiny"},
        "sparsity": {"pattern": "6:8", "rules": rules},
        "schedule": {"steps": 2},
    }
    train(config_from_dict({**sections, "run": run}, "test"))
    whole = analyse(tmp_path / "run").values
    assert whole["kind"] == "bitnet"
    patterns = {layer["name"].split(".")[-2]: layer["pattern"] for layer in whole["layers"]}
    assert "q_proj" not in patterns
    assert patterns.pop("down_proj") == "2:4"
    assert set(patterns.values()) == {"6:8"}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    saved = analyse(checkpoint, tmp_path / "out").values
    assert {**saved, "checkpoint": ""} == {**whole, "checkpoint": ""}
    asked = analyse(checkpoint, tmp_path / "out", pattern="4:8").values
    assert {layer["pattern"] for layer in asked["layers"]} == {"4:8"}
    manifest = checkpoint / "checkpoint.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "ranks": 2}))
    with pytest.raises(CheckpointError, match="a checkpoint of 2 ranks, each weight in pieces"):
        analyse(checkpoint)


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def tiny(architecture: str, **sizes: Any) -> PreTrainedModel:
    """Its linears' rows grow, so that matrices fused into one have unlike γ."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(torch.logspace(-1, 1, weight.shape[-2]).unsqueeze(-1))
    return model


def by_name(analysis: Analysis) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer for layer in analysis.values["layers"]}


def as_training_sees(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The statistics of every master weight, as the modules of a converted model hold it."""
    return {
        one.name: {
            "name": one.name,
            "shape": list(one.weight.shape),
            "shard_sizes": list(one.shard_sizes),
            "pattern": "6:8",
            **as_dict(measure(one.weight, one.pattern, one.shard_sizes)),
        }
        for one in master_weights(model)
    }


@pytest.mark.parametrize("architecture", ["phi3", "glm"])
def test_fused_matrices_have_the_scales_of_training(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture, **SIZES, head_dim=8)
    convert(model, "6:8")
    model.save_pretrained(tmp_path)
    analysis = analyse(tmp_path)
    found = by_name(analysis)
    assert found == as_training_sees(model)
    assert found["model.layers.1.mlp.gate_up_proj.weight"]["shard_sizes"] == [48, 48]
    if architecture == "phi3":
        assert found["model.layers.0.self_attn.qkv_proj.weight"]["shard_sizes"] == [32, 16, 16]
    assert str(analysis).endswith(f"γ: as in training, by the configuration ({architecture})")
    late = next(one for one in early_and_late(model) if one["position"] == "all")
    overall = analysis.values["overall"]
    assert {key: late[key] for key in overall} == overall
    # One γ for the whole of it is another figure, and without a configuration the one there is.
    (tmp_path / "config.json").write_text("{")
    apart = analyse(tmp_path)
    assert "whatever is fused into it, because" in apart.values["scales"]
    name = "model.layers.1.mlp.gate_up_proj.weight"
    weight = model.get_parameter(name)
    assert (
        by_name(apart)[name]["zeros_before_mask"]
        == as_dict(measure(weight, Pattern(6, 8)))["zeros_before_mask"]
    )
    assert by_name(apart)[name]["zeros_before_mask"] != found[name]["zeros_before_mask"]


def test_experts_have_the_scales_of_training(tmp_path: Path) -> None:
    """transformers stores each expert's gate and up apart; a training checkpoint as one weight."""
    model = tiny("mixtral", **SIZES, **EXPERTS)
    convert(model, "6:8")
    model.save_pretrained(tmp_path)
    apart = analyse(tmp_path)
    expected = as_training_sees(model)
    late = next(one for one in early_and_late(model) if one["position"] == "all")
    for key in ("zeros_before_mask", "dead_zone_groups", "magnitudes", "thresholds"):
        assert apart.values["overall"][key] == pytest.approx(late[key], abs=2e-5)
    assert not any("gate_up" in name for name in by_name(apart))
    assert "24 matrices that the model holds otherwise" in apart.values["scales"]
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    together = analyse(tmp_path)
    assert by_name(together) == expected
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert by_name(together)[name]["shard_sizes"] == [48, 48]
    assert "otherwise" not in together.values["scales"]
    # By hand: zeros are |w| ≤ γ/2, γ = mean|w| of each expert's gate and of its up.
    parts = model.get_parameter(name).detach().unflatten(1, (2, 48)).abs()
    zeros = (parts <= parts.mean((2, 3), keepdim=True) / 2).float().mean().item()
    assert by_name(together)[name]["zeros_before_mask"] == pytest.approx(zeros, abs=1e-5)


def test_a_training_checkpoint_has_the_scales_of_its_source(
    tmp_path: Path, toy_tokens: Path
) -> None:
    source = tmp_path / "config.json"
    config = AutoConfig.for_model("phi3", **SIZES | {"vocab_size": 300})
    source.write_text(config.to_json_string())
    sections = {
        "data": {"path": str(toy_tokens), "sequence_length": 16, "batch_size": 2},
        "model": {"source": str(source)},
        "schedule": {"steps": 1},
        "run": {"directory": str(tmp_path / "run"), "checkpoint_every": 1},
    }
    train(config_from_dict(sections, "test"))
    saved = by_name(analyse(tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "out"))
    assert saved == by_name(analyse(tmp_path / "run"))
    assert saved["model.layers.0.mlp.gate_up_proj.weight"]["shard_sizes"] == [48, 48]


def test_what_training_would_leave_is_left_out_with_its_reason(tmp_path: Path) -> None:
    """gpt-oss stores experts as [in, out], and its biases are matrices, too."""
    model = tiny("gpt_oss", **SIZES, **EXPERTS, head_dim=8)
    model.save_pretrained(tmp_path)
    analysis = analyse(tmp_path)
    convert(model, "6:8")
    assert by_name(analysis) == as_training_sees(model)
    left = analysis.values["left_out"]
    assert len(left) == 8
    assert "not gate_up_proj and down_proj alone" in left["model.layers.0.mlp.experts.gate_up_proj"]
    *_, line = str(analysis).splitlines()
    assert line.startswith("left out: 8 matrices, model.layers.0.mlp.experts.")


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_stores_its_weights_the_other_way_round(prefix: str, tmp_path: Path) -> None:
    """Conv1D is [in, out], so groups along the last dimension would be of outputs."""
    model = tiny("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=64)
    model.save_pretrained(tmp_path)
    tensors = {
        name.replace("transformer.", prefix): tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"c_attn\.weight is left out: it belongs to a Conv1D"
    ):
        analyse(tmp_path)
    save_file({**tensors, "extra.weight": torch.randn(8, 8)}, tmp_path / "model.safetensors")
    analysis = analyse(tmp_path)
    assert list(by_name(analysis)) == ["extra.weight"]
    assert set(analysis.values["left_out"]) == {
        f"{prefix}h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_a_configuration_of_another_model_decides_nothing(tmp_path: Path) -> None:
    tiny("phi3", **SIZES).save_pretrained(tmp_path)
    AutoConfig.for_model("phi3", **SIZES | {"intermediate_size": 64}).save_pretrained(tmp_path)
    analysis = analyse(tmp_path)
    assert by_name(analysis)["model.layers.0.mlp.gate_up_proj.weight"]["shard_sizes"] == []
    assert "one each for 4 matrices" in analysis.values["scales"]


def test_a_directory_with_the_name_of_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own configuration counts; ``tiny`` is a Qwen2 elsewhere."""
    monkeypatch.chdir(tmp_path)
    tiny("phi3", **SIZES).save_pretrained("tiny")
    assert analyse("tiny").values["scales"].endswith("(phi3)")
