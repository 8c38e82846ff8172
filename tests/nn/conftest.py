"""Tiny models, and PyTorch kept to the two cores that the tests have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import packed_models

SIZES = packed_models.SMALL | {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "qwen2_moe": packed_models.SIZES["qwen2-moe"]
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "mixtral": packed_models.SIZES["mixtral"],
    "gpt_oss": packed_models.SIZES["mixtral"] | {"head_dim": 8},
    "mistral": {"sliding_window": None},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """``tiny("qwen2", **config)``: the same random model every time."""

    def make(architecture: str = "qwen2", **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        sizes = SIZES | OWN_SIZES.get(architecture, {}) | changes
        config = AutoConfig.for_model(architecture, **sizes)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model

    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 12))


@pytest.fixture
def logits() -> Callable[[nn.Module, Tensor], Tensor]:
    def compute(model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = model.eval()(input_ids=tokens).logits
        return result

    return compute


@pytest.fixture
def threads() -> Iterator[None]:
    """One thread: sums in one order, so runs can be compared bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No graphs of other tests, and none left to them."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
