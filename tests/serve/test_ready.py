"""Models made ready to run say what they said before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sparse_bitnet.core import ConfigError
from sparse_bitnet.deploy.packed.packing import pack
from sparse_bitnet.deploy.packed.pretrained import load, load_with_tokenizer
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.native.layer import StackCall
from sparse_bitnet.nn import convert
from sparse_bitnet.nn.fuse import FusedMLP
from sparse_bitnet.serve.ready import make_ready


def test_a_packed_model_says_the_same(packed: Any) -> None:
    model, tokenizer = load_with_tokenizer(packed())
    tokens = tokenizer("def f(", return_tensors="pt").input_ids
    before = model.generate(tokens, max_new_tokens=8, do_sample=False)
    make_ready(model)
    assert any(isinstance(module, FusedMLP) for module in model.modules())
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), before)


@pytest.mark.skipif(not native.available(), reason="the package was built without a compiler")
def test_single_tokens_are_served_in_one_call(tmp_path: Path, monkeypatch: Any) -> None:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    trained = Qwen2ForCausalLM(config).eval()
    convert(trained, "6:8")
    pack(trained, tmp_path / "packed")
    model, _ = load(tmp_path / "packed", device="cpu")
    make_ready(model)
    calls: list[int] = []
    served = StackCall.__call__

    def counted(self: StackCall, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        return served(self, *arguments)

    monkeypatch.setattr(StackCall, "__call__", counted)
    tokens = torch.randint(0, 64, (1, 5))
    found = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(calls) == 3  # tokens after the first
    expected = trained.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_compiling_wants_a_gpu(packed: Any) -> None:
    model, _ = load_with_tokenizer(packed(), device="cpu")
    with pytest.raises(ConfigError, match="compile needs the model on an NVIDIA GPU, it is on cpu"):
        make_ready(model, compile=True)
