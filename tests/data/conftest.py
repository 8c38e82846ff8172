"""A small corpus, prepared once for all tests of this room."""

import json
import random

import pytest

from sparse_bitnet.data import prepare


def words(seed, documents):
    """Documents of varied length with a few words, code-like lines, accents and emoji."""
    rng = random.Random(seed)
    lexicon = ["the", "quick", "fox", "jumps", "naïve", "café", "数据", "🙂", "x=1", "def f():"]
    texts = []
    for number in range(documents):
        lines = [
            " ".join(rng.choices(lexicon, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 30))
        ]
        texts.append(f"document {number}\n" + "\n".join(lines))
    return texts


@pytest.fixture(scope="session")
def texts():
    return words(0, 400)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts):
    """The texts as JSONL."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus):
    """The corpus as shards of about ten thousand tokens. Read only: copy it to damage it."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_bitnet.data.encode.PORTION_BYTES", 4096)
        prepare(f"jsonl:{corpus}", out, vocab_size=384, validation=0.1, shard_tokens=10_000)
    return out
