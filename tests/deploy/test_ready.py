"""Models made ready to run say what they said before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_bitnet.core import ConfigError
from sparse_bitnet.deploy.pretrained import load_with_tokenizer
from sparse_bitnet.deploy.ready import make_ready
from sparse_bitnet.nn.fuse import FusedMLP


def test_a_packed_model_says_the_same(packed: Any) -> None:
    model, tokenizer = load_with_tokenizer(packed())
    tokens = tokenizer("def f(", return_tensors="pt").input_ids
    before = model.generate(tokens, max_new_tokens=8, do_sample=False)
    make_ready(model)
    assert any(isinstance(module, FusedMLP) for module in model.modules())
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), before)


def test_compiling_wants_a_gpu(packed: Any) -> None:
    model, _ = load_with_tokenizer(packed(), device="cpu")
    with pytest.raises(ConfigError, match="compile needs the model on an NVIDIA GPU, it is on cpu"):
        make_ready(model, compile=True)
