"""Token shards and their index.

What opens gives token ids for every position it claims, and they are those that were written.
"""

import numpy as np

from sparse_bitnet.data import TokenShards, prepare

written = []


def build(directory):
    source = directory.parent / "source"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.txt").write_text(f"text number {number} " * (50 + number))
    prepared = directory.parent / "prepared"
    prepare(f"text:{source}", prepared, vocab_size=270, validation=0, shard_tokens=100, workers=1)
    for path in (prepared / "train").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())


def read(directory, mutation):
    shards = TokenShards(directory)
    assert shards.total_tokens < 10**6
    tokens = shards.tokens(0, shards.total_tokens)
    assert len(tokens) == shards.total_tokens
    if not written:
        written.append(tokens)
    if "index.json" not in mutation.touched:
        assert np.array_equal(tokens, written[0]), "other tokens"
    assert tokens.max() < shards.vocab_size
