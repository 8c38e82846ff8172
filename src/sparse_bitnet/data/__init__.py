"""Data pipeline: text sources, tokenized shards, batches."""

from sparse_bitnet.data.loader import Loader
from sparse_bitnet.data.prepare import prepare
from sparse_bitnet.data.shards import TokenShards
from sparse_bitnet.data.sources import Source, open_source
from sparse_bitnet.data.tokenizer import tokenizer_hash, vocabulary_size

__all__ = [
    "Loader",
    "Source",
    "TokenShards",
    "open_source",
    "prepare",
    "tokenizer_hash",
    "vocabulary_size",
]
