"""Weight analysis of models, against figures worked out by hand and what a trained module holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import tiny_models
from sparse_bitnet.core import CheckpointError, ConfigError, Pattern, PatternError, polarization
from sparse_bitnet.nn import convert, master_weights
from sparse_bitnet.study.polarization import Layer, analyse, early_and_late, pool, rounded
from sparse_bitnet.train import train
from sparse_bitnet.train.recipe import config_from_dict


def tiny(architecture: str, **sizes: Any) -> PreTrainedModel:
    """Its linears' rows grow, so that matrices fused into one have unlike γ."""
    model = tiny_models.tiny(architecture, **sizes)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(torch.logspace(-1, 1, weight.shape[-2]).unsqueeze(-1))
    return model


def layers(directory: Path, **options: Any) -> dict[str, dict[str, Any]]:
    found = analyse(directory, directory.parent / "out", **options).values["layers"]
    return {layer["name"]: layer for layer in found}


def test_hand_computed_statistics(tmp_path: Path) -> None:
    # γ = mean|w| = (4·1 + 4·0.2)/8 = 0.6; |w|/γ is 1.667 or 0.333, so half are zeros. Under 4:8
    # each group of one row loses its four 0.2: threshold 0.333 γ, inside the dead zone.
    row = [1.0, -1.0, 0.2, -0.2, 1.0, 0.2, -1.0, 0.2]
    model = tiny("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).copy_(torch.tensor(row).repeat(48, 4))
    model.save_pretrained(tmp_path / "model")
    untouched = sorted((tmp_path / "model").iterdir())
    analysis = analyse(tmp_path / "model", pattern="4:8")
    heading, *lines = str(analysis).splitlines()
    assert heading.split() == ["matrix", "shape", "pattern", "zeros", "lose", "nothing", "kurtosis"]
    (line,) = (line for line in lines if line.startswith(name))
    assert line.split()[:5] == [name, "48×32", "4:8", "50.0%", "100.0%"]
    assert lines[14].startswith("all ")
    layer = next(one for one in analysis.values["layers"] if one["name"] == name)
    assert (layer["zeros_before_mask"], layer["dead_zone_groups"]) == (0.5, 1.0)
    edges = layer["edges"]
    first = max(i for i in range(80) if edges[i] <= 0.2 / 0.6)
    second = max(i for i in range(80) if edges[i] <= 1.0 / 0.6)
    assert layer["magnitudes"][first] == layer["magnitudes"][second] == 0.5
    assert layer["thresholds"][first] == 1.0
    # Signed values ±1 and ±0.2 around a mean of 0.05: fourth moment over squared variance.
    centred = [w - sum(row) / 8 for w in row]
    kurtosis = (sum(c**4 for c in centred) / 8) / (sum(c**2 for c in centred) / 8) ** 2
    assert layer["kurtosis"] == pytest.approx(kurtosis, abs=1e-4)
    assert sorted((tmp_path / "model").iterdir()) == untouched
    analyse(tmp_path / "model", tmp_path / "out", pattern="4:8")
    written = json.loads((tmp_path / "out" / "polarization.json").read_text())
    assert written == analysis.values
    for picture in ("polarization.png", "layers.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 1000
    # A sparser pattern cuts into the large weights: threshold 1.667 γ, outside the dead zone.
    assert layers(tmp_path / "model", pattern="2:8")[name]["dead_zone_groups"] == 0.0


def test_pool_weighs_by_size() -> None:
    def layer(*values: float) -> Layer:
        found = polarization(torch.tensor([values]), Pattern(1, 1))
        return {"shape": [1, len(values)], **dataclasses.asdict(found)}

    both = pool([layer(1.0, 1.0), layer(2.0, 0.0, 2.0, 0.0, 2.0, 0.0)])
    assert both["zeros_before_mask"] == pytest.approx(3 / 8)
    assert sum(both["magnitudes"]) == pytest.approx(1)


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


def test_what_rules_decided_in_training_counts(tmp_path: Path, toy_tokens: Path) -> None:
    sections = {
        "data": {"path": str(toy_tokens), "sequence_length": 16, "batch_size": 2},
        "model": {"source": "tiny"},
        "sparsity": {"pattern": "6:8", "rules": {"down_proj": "2:4", "q_proj": "skip"}},
        "schedule": {"steps": 2},
        "run": {"directory": str(tmp_path / "run")},
    }
    train(config_from_dict(sections, "test"))
    whole = analyse(tmp_path / "run").values
    assert whole["kind"] == "bitnet"
    patterns = {layer["name"].split(".")[-2]: layer["pattern"] for layer in whole["layers"]}
    assert "q_proj" not in patterns and "lm_head" not in patterns
    assert patterns.pop("down_proj") == "2:4"
    assert set(patterns.values()) == {"6:8"}
    asked = layers(tmp_path / "run", pattern="4:8")
    assert {layer["pattern"] for layer in asked.values()} == {"4:8"} and len(asked) == 12


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(
    ("architecture", "more"), [("phi3", {}), ("glm", {"head_dim": 8}), ("mixtral", {})]
)
def test_fused_matrices_and_experts_have_the_scales_of_training(
    architecture: str, more: dict[str, Any], converted: bool, tmp_path: Path
) -> None:
    """An ordinary directory is measured as training would begin with it."""
    model = tiny(architecture, **more)
    if converted:
        convert(model, "6:8")
    model.save_pretrained(tmp_path / "model")
    if not converted:
        convert(model, "6:8")
    assert layers(tmp_path / "model") == {
        one.name: {
            "name": one.name,
            "shape": list(one.weight.shape),
            "shard_sizes": list(one.shard_sizes),
            "pattern": "6:8",
            **rounded(dataclasses.asdict(polarization(one.weight, one.pattern, one.shard_sizes))),
        }
        for one in master_weights(model)
    }


def test_what_training_would_leave_is_left_out_with_its_reason(tmp_path: Path) -> None:
    """gpt-oss stores experts as [in, out]; of GPT-2 nothing is a linear."""
    tiny("gpt_oss").save_pretrained(tmp_path / "model")
    analysis = analyse(tmp_path)
    left = analysis.values["left_out"]
    assert any("mlp.experts" in name for name in left)
    assert "left out: model.layers.0.mlp.experts" in str(analysis)
    tiny("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=64).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"no nn\.Linear or expert weights"):
        analyse(tmp_path / "gpt2")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        analyse(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="has no master weights; give a training run"):
        analyse(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"holds no model: there is no config\.json"):
        analyse(tmp_path)
    packed = {"quantization_config": {"quant_method": "sparse_bitnet"}}
    (tmp_path / "config.json").write_text(json.dumps(packed))
    with pytest.raises(CheckpointError, match="of a packed model, the one that it was packed from"):
        analyse(tmp_path)
    tiny("llama", intermediate_size=44).save_pretrained(tmp_path / "odd")
    with pytest.raises(PatternError, match="in_features 44 is not a multiple of M = 8"):
        analyse(tmp_path / "odd")
