"""A directory that data preparation left unfinished, or finished: its journal, tokenizer, splits.

Going on from it gives the very tokens that an undisturbed run gives, unless the journal was edited.
As it writes into the damaged directory, an OSError that names the place (a directory where a file
should be) is as good as one of ours.
"""

import numpy as np

from sparse_bitnet.data import TokenShards, prepare

ACCEPTED = (OSError,)
written = []
SETTINGS = {
    "vocab_size": 270,
    "validation": 0,
    "shard_tokens": 100,
    "workers": 1,
}


def build(directory):
    source = directory.parent / "source"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.txt").write_text(f"text number {number} " * (50 + number))
    prepare(f"text:{source}", directory, **SETTINGS)


def read(directory, mutation):
    source = directory.parent.parent / "source"
    prepare(f"text:{source}", directory, **SETTINGS)
    shards = TokenShards(directory / "train")
    tokens = shards.tokens(0, shards.total_tokens)
    if not written:
        written.append(tokens)
    if not any(name.endswith("prepare.json") for name in mutation.touched):
        assert np.array_equal(tokens, written[0]), "other tokens"
