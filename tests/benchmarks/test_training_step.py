"""The training benchmark on a tiny shape: every row trains, a bad one is noted and survived."""

import json

import pytest
import torch

TINY = ["--sizes", "tiny", "--vocabulary", "64", "--sequence-length", "16", "--sequences", "2"]


@pytest.fixture
def script():
    pytest.importorskip("triton")
    import training_step

    return training_step


def test_rows_share_one_model(script, tmp_path):
    rows = ["bf16", "fake-quant 6:8", "dense", "6:8 fp8", "nonsense"]
    quick = ["--rounds", "2", "--steps", "1", "--no-compile", "--out", str(tmp_path)]
    script.main([*TINY, *quick, "--rows", *rows])
    written = json.loads((tmp_path / "training_step.json").read_text())
    by_name = {row["row"]: row for row in written["rows"]}
    assert set(by_name) == set(rows)
    assert "nonsense" in by_name.pop("nonsense")["failed"]
    for row in by_name.values():
        assert len(row["all_milliseconds"]) == 2
        assert row["first_loss"] == pytest.approx(4.16, abs=0.2)  # log 64, near enough
        assert row["tokens_per_second"] == pytest.approx(32e3 / row["milliseconds"])
    assert by_name["bf16"]["over_bf16"] == 1.0
    assert written["environment"]["torch"] == torch.__version__


def test_fake_quantization_is_the_method(script):
    """Forward and gradients in float32 equal the integer layer's."""
    from sparse_bitnet.core import Pattern
    from sparse_bitnet.nn import SparseBitLinear
    from training_models import FakeQuantLinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 6)
    fake = FakeQuantLinear(linear, Pattern(6, 8))
    ours = SparseBitLinear(linear, Pattern(6, 8))
    grads = []
    for module in (fake, ours):
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        grads.append((y, x.grad, linear.weight.grad, linear.bias.grad))
        linear.zero_grad()
    for theirs, mine in zip(*grads, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)


def test_names_of_rows():
    from training_models import Row

    assert Row.parse("bf16").kind == "bf16"
    assert Row.parse("fake-quant 2:4").pattern == "2:4"
    assert Row.parse("6:8 fp8").method.backward == "fp8"
    assert Row.parse("6:8").method.backward == "full"
    assert not Row.parse("dense plain-compile").options
    for wrong in (
        "6:8 quickly",
        "6:8 sparse-forward",
        "6:8 rows-by-op",
    ):
        with pytest.raises(ValueError, match="none of"):
            Row.parse(wrong)
