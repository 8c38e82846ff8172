"""Tiny models, and PyTorch kept to the two cores that the tests have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import tiny_models


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    return tiny_models.tiny


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, tiny_models.SIZES["vocab_size"], (2, 12))


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
