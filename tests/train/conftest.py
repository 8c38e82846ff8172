"""Fixtures of the training tests: tokens that can be learned, made without a tokenizer."""

import hashlib

import numpy as np
import pytest
import torch

from sparse_bitnet.data.shards import Shard, index_text, token_dtype
from sparse_bitnet.train.recipe import config_from_dict

VOCABULARY = 64


def write_tokens(directory, count, seed, vocabulary=VOCABULARY):
    """Three tokens of four follow from the one before. Integer arithmetic: equal everywhere."""
    tokens = np.empty(count, dtype="<u2")
    state, token = seed, 0
    for position in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        draw = state >> 16
        token = (token * 5 + 1) % vocabulary if draw % 4 else draw % vocabulary
        tokens[position] = token
    directory.mkdir(parents=True)
    data = tokens.tobytes()
    (directory / "0.bin").write_bytes(data)
    shard = Shard("0.bin", count, 1, count, hashlib.sha256(data).hexdigest())
    text = index_text([shard], tokenizer_hash="0" * 64, vocab_size=vocabulary, eos_id=0)
    (directory / "index.json").write_text(text)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "tokens"
    write_tokens(directory / "train", 20_000, seed=1)
    write_tokens(directory / "validation", 3_000, seed=2)
    return directory


def write_chats(directory, count, seed):
    """Documents of 4 to 30 tokens; the second half of each is an answer that can be learned."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(count):
        length = int(rng.integers(4, 31))
        tokens = np.zeros(length, token_dtype(VOCABULARY, answers=True))
        tokens["id"] = (rng.integers(VOCABULARY) + 5 * np.arange(length)) % VOCABULARY
        tokens["answer"] = np.arange(length) >= length // 2
        tokens["first"][0] = 1
        parts.append(tokens)
    data = np.concatenate(parts).tobytes()
    directory.mkdir(parents=True)
    (directory / "0.bin").write_bytes(data)
    tokens_in_all = sum(map(len, parts))
    shard = Shard("0.bin", tokens_in_all, count, 1, hashlib.sha256(data).hexdigest())
    index = {"tokenizer_hash": "0" * 64, "vocab_size": VOCABULARY, "eos_id": 0}
    (directory / "index.json").write_text(index_text([shard], **index, answers=True))


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chats") / "data"
    write_chats(directory / "train", 300, seed=1)
    write_chats(directory / "validation", 40, seed=2)
    return directory


@pytest.fixture(autouse=True)
def one_thread():
    # The models are tiny: a second thread only waits, for the other test process above all.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recipes:
    """Configurations for tests, as a recipe would give them."""

    def __init__(self, tokens, directory):
        self.tokens, self.directory = tokens, directory

    def values(self, name="run", **sections):
        values = {
            "model": {"source": "tiny"},
            "data": {"path": str(self.tokens), "sequence_length": 32, "batch_size": 8},
            "optimizer": {"learning_rate": 3e-3},
            "schedule": {"steps": 12},
            "run": {
                "directory": str(self.directory / name),
                "device": "cpu",
                "log_every": 1,
                "checkpoint_every": 0,
                "validation_sequences": 16,
            },
        }
        for section, changes in sections.items():
            values.setdefault(section, {}).update(changes)
        return values

    def __call__(self, name="run", **sections):
        return config_from_dict(self.values(name, **sections), "test")


@pytest.fixture(scope="session")
def recipes_in(tokens):
    """For fixtures that outlive a test: recipes whose runs lie in a given directory."""
    return lambda directory: Recipes(tokens, directory)


@pytest.fixture
def recipe(tokens, tmp_path):
    return Recipes(tokens, tmp_path)
