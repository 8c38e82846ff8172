"""Tiny models, and PyTorch kept to the two cores that the tests have."""

import pytest
import torch
from torch._dynamo.utils import counters

import tiny_models


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    return tiny_models.tiny


@pytest.fixture
def tokens():
    return torch.randint(0, tiny_models.SIZES["vocab_size"], (2, 12))


@pytest.fixture
def logits():
    def compute(model, tokens):
        with torch.no_grad():
            result = model.eval()(input_ids=tokens).logits
        return result

    return compute


@pytest.fixture
def threads():
    """One thread: sums in one order, so runs can be compared bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler():
    """No graphs of other tests, and none left to them."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
