"""One-shot masking: what is measured, what changes and what does not."""

import math

import pytest
import torch

from sparse_bitnet.core import DataError, Pattern, PatternError, nm_mask
from sparse_bitnet.evaluate import perplexity
from sparse_bitnet.export.bitnet.one_shot import mask_one_shot
from sparse_bitnet.nn import converted_modules, set_pattern

TEXT = "def main():\n    return the name of the file\n" * 20


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return f"text:{path}"


def test_masks_by_the_largest_master_weights(trained, tokenizer, text):
    model = trained("qwen2", pattern="dense")
    before = {name: m.weight.clone() for name, m in converted_modules(model)}
    result = mask_one_shot(model, tokenizer, "2:4", text, window=32)
    for name, module in converted_modules(model):
        assert torch.equal(module.weight, before[name])
        kept = nm_mask(before[name], Pattern.parse("2:4"))
        assert torch.equal(module.derived()[0] != 0, kept & (module.derived()[0] != 0))
    measured = perplexity(model, text.removeprefix("text:"), tokenizer=tokenizer, window=32)
    assert result.after.loss == pytest.approx(measured.loss, rel=1e-6)
    set_pattern(model, "dense")
    measured = perplexity(model, text.removeprefix("text:"), tokenizer=tokenizer, window=32)
    assert result.before.loss == pytest.approx(measured.loss, rel=1e-6)
    assert str(result).startswith(f"perplexity {math.exp(measured.loss):.2f} before, ")


def test_what_fails_changes_nothing(trained, tokenizer, text):
    model = trained("qwen2", pattern="dense")
    with pytest.raises(PatternError, match="3:5"):
        mask_one_shot(model, tokenizer, "3:5", text)
    with pytest.raises(DataError):
        mask_one_shot(model, tokenizer, "2:4", "text:/nowhere")
    assert all(module.pattern.is_dense for _, module in converted_modules(model))
