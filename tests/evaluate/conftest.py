import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.nn import convert

SENTENCE = "the quick brown dog jumps over lazy foxes while seven green birds watch them quietly"
WORDS = SENTENCE.split()


def make_prose(paragraphs=12):
    """Paragraphs of 30 words that end in a full stop; different ones, in a fixed order."""
    lines = []
    for number in range(paragraphs):
        picked = [WORDS[(number * 7 + k * (number % 5 + 1)) % len(WORDS)] for k in range(29)]
        lines.append(" ".join([*picked, WORDS[4 + number % 8]]) + ".")
    return "\n\n".join(lines)


@pytest.fixture(scope="session")
def prose():
    return make_prose()


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe([make_prose()], vocab_size=320)


def tiny_model(vocab=320, **options):
    torch.manual_seed(0)
    settings = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # predictions far from uniform
    }
    return Qwen2ForCausalLM(Qwen2Config(**settings | options)).eval()


@pytest.fixture(scope="session")
def make_model():
    return tiny_model


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def ternary_model():
    model = tiny_model()
    convert(model, "6:8")
    return model
