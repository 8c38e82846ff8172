"""Text sources: JSON lines plain and compressed, Parquet, plain text.

What is read are documents that UTF-8 can hold, and as many as the clean files have at most, unless
the damage made lines of its own.
"""

import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet

from sparse_bitnet.data import open_source

NAMED = True
TEXTS = [f"document {number}, with some words in it\n" * (1 + number % 7) for number in range(40)]
MOST_CHARACTERS = 10**6


def build(directory):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (directory / "a.jsonl").write_text(lines)
    (directory / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (directory / "c.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    pa.parquet.write_table(pa.table({"text": TEXTS}), directory / "d.parquet")
    (directory / "e.txt").write_text(TEXTS[3])


def read(directory, mutation):
    for path in sorted(directory.iterdir()):
        kind = {".txt": "text", ".parquet": "parquet"}.get(path.suffix, "jsonl")
        if path.suffix != ".py":
            documents = list(open_source(f"{kind}:{path}"))
            assert sum(len(document.encode()) for document in documents) < MOST_CHARACTERS
