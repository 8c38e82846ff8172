"""How fast is `data prepare`, in megabytes of text a second a core, and how fast is the loader?

    python benchmarks/data_prepare.py [--source jsonl:PATH.jsonl.xz] [--repeats 5]

Sources: the Python standard library, and, if named, the first 30 MB of any other (its text is not
kept). Each is prepared with a byte-level BPE trained on it, then again with that tokenizer, with
one worker and with one a core. Of these later runs the best is reported, since other work on the
machine can only slow one down; the JSON holds every run. Loading the tokenizer, reading, hashing,
tokenizing and writing with fsync are all in the time.

The target is judged by MB per second of processor time (all threads together), which is a core's
rate whether or not the other cores are busy with something else; MB/s by the clock stands beside
it, and equals it times the workers on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from machine import measured_on
from sparse_bitnet.console import out, say
from sparse_bitnet.data import Loader, TokenShards, prepare
from sparse_bitnet.files import write_text

RESULTS = Path(__file__).parent / "results"
TARGET = 3.0  # MB of text a second a core
VOCABULARIES = (4096, 8192)
MAX_BYTES = 30_000_000
SEQUENCE_LENGTH, BATCH_SIZE, STEPS = 512, 64, 300


def measure(source: str, name: str, vocab_size: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one source: one worker, and one a core."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first = prepare(source, Path(folder) / "first", vocab_size=vocab_size, max_bytes=MAX_BYTES)
        tokenizer = str(Path(folder) / "first" / "tokenizer")
        megabytes = (first["train"]["bytes"] + first["validation"]["bytes"]) / 1e6
        tokens = first["train"]["tokens"] + first["validation"]["tokens"]
        loader = measure_loader(Path(folder) / "first" / "train")
        for workers in sorted({1, os.cpu_count() or 1}):
            wall, cpu = [], []
            for repeat in range(repeats):
                before = time.process_time()
                target = Path(folder) / f"{workers}-{repeat}"
                run = prepare(
                    source, target, tokenizer=tokenizer, workers=workers, max_bytes=MAX_BYTES
                )
                wall.append(run["seconds"])
                cpu.append(time.process_time() - before)
            rate = megabytes / min(wall)
            rows.append(
                {
                    "source": name,
                    "vocab_size": vocab_size,
                    "text_mb": megabytes,
                    "bytes_per_token": megabytes * 1e6 / tokens,
                    "workers": workers,
                    "seconds_with_training_the_tokenizer": first["seconds"],
                    "seconds": wall,
                    "cpu_seconds": cpu,
                    "mb_per_second": rate,
                    "mb_per_cpu_second": megabytes / min(cpu),
                    "loader_tokens_per_second": loader,
                }
            )
    return rows


def measure_loader(shards: Path) -> float:
    """Tokens a second of batches of 64 windows of 512, one process."""
    loader = Loader(TokenShards(shards), SEQUENCE_LENGTH, BATCH_SIZE)
    started = time.perf_counter()
    for step in range(STEPS):
        loader.batch(step)
    return STEPS * BATCH_SIZE * SEQUENCE_LENGTH / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="another source, as in `data prepare`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu" / "data_prepare.json")
    options = parser.parse_args()
    machine = measured_on()
    sources = [("stdlib", "stdlib")]
    if options.source:
        # Only the file's form is told: the text belongs to whoever runs this.
        suffixes = Path(options.source.partition("#")[0]).suffixes
        sources.append((options.source, "".join(suffixes[-2:]) or "other"))
    rows = [
        row
        for spec, name in sources
        for vocab_size in VOCABULARIES
        for row in measure(spec, name, vocab_size, options.repeats)
    ]
    table = Table("source", "BPE", "MB", "workers", "MB/s", "MB/CPU s", "loader, Mtoken/s")
    for row in rows:
        table.add_row(
            row["source"],
            str(row["vocab_size"]),
            f"{row['text_mb']:.1f}",
            str(row["workers"]),
            f"{row['mb_per_second']:.2f}",
            f"{row['mb_per_cpu_second']:.2f}",
            f"{row['loader_tokens_per_second'] / 1e6:.0f}",
        )
    out.print(table)
    slowest = min(row["mb_per_cpu_second"] for row in rows)
    machine["load_average_after"] = os.getloadavg()[0]
    result = {
        "question": "MB of text a second a core of `data prepare`",
        "target": TARGET,
        "slowest_mb_per_cpu_second": slowest,
        "reached": slowest >= TARGET,
        "rows": rows,
        "environment": machine,
    }
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    say(f"slowest {slowest:.2f} MB per CPU second, target {TARGET}; written to {options.output}")


if __name__ == "__main__":
    main()
