"""Parallel tokenization into shard files; the result does not depend on the worker count.

Parallelism is threads: the tokenizer releases the interpreter's lock, so two threads measured twice
the speed of one, without the start-up, the pickling and the copies of processes.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparse_bitnet.console import progress
from sparse_bitnet.data.journal import TRAIN, VALIDATION, Journal, Part
from sparse_bitnet.data.shards import Shard, token_dtype
from sparse_bitnet.data.sources import Source
from sparse_bitnet.data.tokenizer import Encoder, document_hash
from sparse_bitnet.files import atomic_file

BATCH_BYTES = 1 << 19  # one worker's portion: a tenth of a second
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Selection:
    """Which documents of a source are read, and which of them are held out.

    Attributes:
        source: the documents.
        limit: read no further than the document that reaches this many bytes of text.
        held_out: fraction for validation: those whose content's hash falls below it.
        splits: where kept and held-out documents go.
    """

    source: Source
    limit: float
    held_out: float
    splits: tuple[str, str] = (TRAIN, VALIDATION)

    def documents(self, start: int = 0, before: int = 0) -> Iterator[tuple[str, str, int, int]]:
        """``(text, split, UTF-8 bytes, position)`` from document ``start`` on, before which the
        source had ``before`` bytes of text."""
        if before >= self.limit:
            return
        for text, position in self.source.read(start):
            data = text.encode()
            held_out = document_hash(data) < self.held_out * 2.0**64
            yield text, self.splits[held_out], len(data), position
            before += len(data)
            if before >= self.limit:
                return


@dataclass
class Batch:
    """Documents that one worker encodes at once.

    Attributes:
        texts, split_bytes: the documents of each split, and their UTF-8 bytes.
        documents, bytes: read from the source, empty documents included.
        position: of the source after them.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    split_bytes: dict[str, int] = field(default_factory=dict)
    documents: int = 0
    bytes: int = 0
    position: int = 0


def batches(selection: Selection, start: int, before: int) -> Iterator[Batch]:
    """The documents from ``start`` on, in batches of half a megabyte of text."""
    batch = Batch()
    for text, split, size, position in selection.documents(start, before):
        batch.documents += 1
        batch.bytes += size
        batch.position = position
        if text:
            batch.texts.setdefault(split, []).append(text)
            batch.split_bytes[split] = batch.split_bytes.get(split, 0) + size
        if batch.bytes >= BATCH_BYTES:
            yield batch
            batch = Batch()
    if batch.bytes:
        yield batch


def encode(
    number: int,
    selection: Selection,
    encoder: Encoder,
    journal: Journal,
    out: Path,
    shard_tokens: int,
    workers: int,
) -> None:
    """Encode a source (``number`` in the journal) from where the journal's parts of it end.

    A part ends with the batch that fills a shard of either split, so it depends on the documents
    alone, and the next part may start in another process.

    Raises:
        DataError: if the source cannot be read.
    """
    source = selection.source
    done = [part for part in journal.parts if part.source == number]
    documents, text_bytes = (done[-1].documents, done[-1].bytes) if done else (0, 0)
    started, before = time.monotonic(), text_bytes
    todo = batches(selection, documents, text_bytes)
    with (
        _one_thread_each(),
        reading(f"tokenize {source.spec}", source) as show,
        PartWriter(out, encoder) as writer,
        ThreadPoolExecutor(workers) as pool,
    ):
        for batch, encoded in _in_order(pool, encoder, todo, ahead=2 * workers):
            documents += batch.documents
            text_bytes += batch.bytes
            writer.add(batch, encoded, len(journal.parts))
            if writer.tokens >= shard_tokens:
                journal.parts.append(Part(number, documents, text_bytes, writer.close()))
                journal.save(out)
            rate = (text_bytes - before) / MEGABYTE / (time.monotonic() - started)
            show(batch.position, text_bytes, f", {rate:.1f} MB/s")
        if writer.tokens:
            journal.parts.append(Part(number, documents, text_bytes, writer.close()))
            journal.save(out)


@contextmanager
def reading(description: str, source: Source) -> Iterator[Callable[[int, int, str], None]]:
    """Progress in megabytes of the source: yields ``show(position, bytes of text, detail)``."""
    shown = 0
    with progress(description, (source.size or 0) // MEGABYTE or None) as bar:

        def show(position: int, text_bytes: int, detail: str) -> None:
            nonlocal shown
            megabytes = (position if source.size else text_bytes) // MEGABYTE
            bar.advance(megabytes - shown, f"{text_bytes / MEGABYTE:,.0f} MB of text{detail}")
            shown = megabytes

        yield show


class PartWriter:
    """Collects tokens into one file a split, and gives the finished files as shards.

    A split's file is made when its first token comes, so a part may lack a split. Leaving the
    context by an error removes the unfinished files.
    """

    def __init__(self, out: Path, encoder: Encoder) -> None:
        self.out, self.dtype = out, token_dtype(encoder.vocab_size)
        self._files = ExitStack()
        self._open: dict[str, _ShardWriter] = {}

    @property
    def tokens(self) -> int:
        """In the larger of the files."""
        return max((writer.tokens for writer in self._open.values()), default=0)

    def add(self, batch: Batch, encoded: dict[str, np.ndarray], part: int) -> None:
        for split, tokens in encoded.items():
            if split not in self._open:
                path = self.out / split / f"{part:05d}.bin"
                file = self._files.enter_context(_atomic_binary(path))
                self._open[split] = _ShardWriter(path.name, file, self.dtype)
            self._open[split].add(tokens, len(batch.texts[split]), batch.split_bytes[split])

    def close(self) -> dict[str, Shard]:
        """Put the files in place."""
        self._files.close()
        shards = {split: writer.shard() for split, writer in self._open.items()}
        self._open = {}
        return shards

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)


class _ShardWriter:
    def __init__(self, name: str, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self.name, self.file, self.dtype = name, file, dtype
        self.digest = hashlib.sha256()
        self.tokens = self.documents = self.bytes = 0

    def add(self, tokens: np.ndarray, documents: int, text_bytes: int) -> None:
        data = tokens.astype(self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(tokens)
        self.documents += documents
        self.bytes += text_bytes

    def shard(self) -> Shard:
        return Shard(self.name, self.tokens, self.documents, self.bytes, self.digest.hexdigest())


@contextmanager
def _atomic_binary(path: Path) -> Iterator[BinaryIO]:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        yield file


def _in_order(
    pool: ThreadPoolExecutor, encoder: Encoder, todo: Iterable[Batch], ahead: int
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Each batch with the tokens of its splits, in the order of the batches.

    At most ``ahead`` batches are read before they are due, which bounds memory.
    """

    def work(batch: Batch) -> dict[str, np.ndarray]:
        return {split: encoder.encode(texts) for split, texts in batch.texts.items()}

    waiting: deque[tuple[Batch, Future[dict[str, np.ndarray]]]] = deque()
    try:
        for batch in todo:
            waiting.append((batch, pool.submit(work, batch)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Each worker is one thread: keep the tokenizer from starting one a core for each of them."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
