"""What an export reads is the same whether the model was packed before or not."""

import pytest
import torch

from sparse_bitnet.core import CheckpointError, ConfigError, WeightError
from sparse_bitnet.export.exportable import ExportResult, open_exportable
from sparse_bitnet.nn import SparseBitLinear
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train import SparsityConfig, save_trained


@pytest.fixture
def saved(tmp_path, trained):
    def save(model=None, **sparsity):
        model = model or trained("qwen2")
        save_trained(model, None, tmp_path / "t", SparsityConfig(**{"pattern": "6:8"} | sparsity))
        return tmp_path / "t"

    return save


def test_trained_and_packed_are_read_alike(tmp_path, saved, trained):
    model = trained("qwen2")
    pack(model, tmp_path / "packed", storage="trits")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, SparseBitLinear)}
    for directory in (saved(model), tmp_path / "packed"):
        source = open_exportable(directory, "a file")
        assert source.shapes == {n: tuple(m.weight.shape) for n, m in linears.items()}
        assert source.weights == sum(m.weight.numel() for m in linears.values())
        for name, module in linears.items():
            ternary, rows = source.linear(name)
            assert torch.equal(ternary, module.derived()[0])
            assert torch.equal(rows, module.derived()[1].expand(module.out_features))
        others = {
            n: p for n, p in model.named_parameters() if n.removesuffix(".weight") not in linears
        }
        assert source.others.keys() == others.keys()
        assert all(torch.equal(source.others[n], others[n]) for n in others)


def test_what_is_not_ternary_or_not_finite(tmp_path, saved, trained):
    with pytest.raises(CheckpointError):
        open_exportable(tmp_path, "a file")
    with pytest.raises(ConfigError, match="a SparseLinear has no place in a file"):
        open_exportable(saved(trained("qwen2", kind="bf16"), kind="bf16"), "a file")
    model = trained("qwen2")
    pack(model, tmp_path / "packed")
    assert open_exportable(tmp_path / "packed", "a file").tokenizer is None
    model.model.layers[1].self_attn.v_proj.bias.data[3] = float("nan")
    with pytest.raises((WeightError, CheckpointError), match=r"v_proj\.bias: 1 of 16"):
        open_exportable(saved(model), "a file")


def test_the_result_in_lines(tmp_path):
    result = ExportResult(tmp_path / "m", "GGUF", 1_234_567, 2_500_000, ["one thing", "another"])
    assert str(result).splitlines() == [
        f"{tmp_path / 'm'}: GGUF, 1,234,567 ternary weights, 2.5 MB",
        "  · one thing",
        "  · another",
    ]
