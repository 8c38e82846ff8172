"""Weight analysis of checkpoints, against figures worked out by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparse_bitnet.core import CheckpointError, PatternError, WeightError
from sparse_bitnet.core import polarization as measure
from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.nn import convert
from sparse_bitnet.study.polarization import analyse, early_and_late, pool
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
    heading, line, total = str(analysis).splitlines()
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
    with pytest.raises(PatternError, match=r"6 is not a multiple of M = 8"):
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
