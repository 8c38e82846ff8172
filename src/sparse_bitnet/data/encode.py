"""Parallel tokenization into shard files; the result does not depend on the worker count.

Parallelism is threads: the tokenizer releases the interpreter's lock, so two threads measured twice
the speed of one, without the start-up, the pickling and the copies of processes.
"""

from __future__ import annotations

import hashlib
import json
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
from sparse_bitnet.data.chat import Chat, ChatTemplate
from sparse_bitnet.data.journal import TRAIN, VALIDATION, Journal, Part
from sparse_bitnet.data.shards import Shard
from sparse_bitnet.data.sources import Source
from sparse_bitnet.data.tokenizer import Encoder, document_hash
from sparse_bitnet.files import atomic_file

PORTION_BYTES = 1 << 19  # one worker's portion: a tenth of a second
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Selection:
    """Which documents of a source are read, and which of them are held out."""

    source: Source
    limit: float  # read no further than the document that reaches this many bytes of text
    held_out: float  # fraction for validation: those whose content's hash falls below it
    splits: tuple[str, str] = (TRAIN, VALIDATION)  # where kept and held-out documents go

    def documents(
        self, start: int = 0, before: int = 0, template: ChatTemplate | None = None
    ) -> Iterator[tuple[Any, str, int, int]]:
        """``(document, split, UTF-8 bytes, position)`` from document ``start`` on, before which the
        source had ``before`` bytes of text. Conversations are rendered by ``template``; one that is
        left out is empty."""
        if before >= self.limit:
            return
        for found, record in self.source.read(start):
            document: str | Chat
            if isinstance(found, str):
                document = text = content = found
            else:
                assert template is not None
                document = template.render(found, record.place) or Chat("", [])
                text, content = document.text, json.dumps(found)
            held_out = document_hash(content.encode()) < self.held_out * 2.0**64
            size = len(text.encode())
            yield document, self.splits[held_out], size, record.position
            before += size
            if before >= self.limit:
                return


@dataclass
class Portion:
    """Documents that one worker encodes at once."""

    documents: dict[str, list[Any]] = field(default_factory=dict)  # of each split, no empty ones
    split_bytes: dict[str, int] = field(default_factory=dict)  # UTF-8 bytes of them
    read: int = 0  # documents, and bytes, read from the source
    bytes: int = 0
    position: int = 0  # of the source after them


def portions(documents: Iterable[tuple[Any, str, int, int]]) -> Iterator[Portion]:
    """The documents of a selection in portions of half a megabyte of text."""
    portion = Portion()
    for document, split, size, position in documents:
        portion.read += 1
        portion.bytes += size
        portion.position = position
        if size:
            portion.documents.setdefault(split, []).append(document)
            portion.split_bytes[split] = portion.split_bytes.get(split, 0) + size
        if portion.bytes >= PORTION_BYTES:
            yield portion
            portion = Portion()
    if portion.bytes:
        yield portion


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

    A part ends with the portion that fills a shard of either split, so it depends on the documents
    alone, and the next part may start in another process.

    Raises:
        DataError: if the source cannot be read.
    """
    source = selection.source
    template = ChatTemplate(encoder.tokenizer, encoder.where) if source.has_chats else None
    done = [part for part in journal.parts if part.source == number]
    documents, text_bytes = (done[-1].documents, done[-1].bytes) if done else (0, 0)
    started, before = time.monotonic(), text_bytes
    todo = portions(selection.documents(documents, text_bytes, template))
    encode_documents = encoder.encode_chats if source.has_chats else encoder.encode

    def work(portion: Portion) -> dict[str, np.ndarray]:
        return {split: encode_documents(some) for split, some in portion.documents.items()}

    with (
        _one_thread_each(),
        reading(f"tokenize {source.spec}", source) as show,
        PartWriter(out, encoder.dtype(source.has_chats)) as writer,
        ThreadPoolExecutor(workers) as pool,
    ):
        for portion, encoded in _in_order(pool, work, todo, ahead=2 * workers):
            documents += portion.read
            text_bytes += portion.bytes
            writer.add(portion, encoded, len(journal.parts))
            if writer.tokens >= shard_tokens:
                journal.parts.append(Part(number, documents, text_bytes, writer.finish()))
                journal.save(out)
            rate = (text_bytes - before) / MEGABYTE / (time.monotonic() - started)
            show(portion.position, text_bytes, f", {rate:.1f} MB/s")
        if writer.tokens:
            journal.parts.append(Part(number, documents, text_bytes, writer.finish()))
            journal.save(out)
    if template is not None:
        template.report()


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


class PartWriter(ExitStack):
    """Collects tokens into one file a split, and gives the finished files as shards.

    A split's file is made when its first token comes, so a part may lack a split. Leaving the
    context by an error removes the unfinished files.
    """

    def __init__(self, out: Path, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self.out, self.dtype = out, dtype
        self._open: dict[str, _ShardWriter] = {}

    @property
    def tokens(self) -> int:
        """In the larger of the files."""
        return max((writer.tokens for writer in self._open.values()), default=0)

    def add(self, portion: Portion, encoded: dict[str, np.ndarray], part: int) -> None:
        for split, tokens in encoded.items():
            if split not in self._open:
                path = self.out / split / f"{part:05d}.bin"
                file = self.enter_context(self.enter_context(atomic_file(path)).open("wb"))
                self._open[split] = _ShardWriter(path.name, file)
            data = tokens.astype(self.dtype).tobytes()
            self._open[split].add(
                data, len(tokens), len(portion.documents[split]), portion.split_bytes[split]
            )

    def finish(self) -> dict[str, Shard]:
        """Put the files in place."""
        self.close()
        shards = {split: writer.shard() for split, writer in self._open.items()}
        self._open = {}
        return shards


class _ShardWriter:
    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name, self.file = name, file
        self.digest = hashlib.sha256()
        self.tokens = self.documents = self.bytes = 0

    def add(self, data: bytes, tokens: int, documents: int, text_bytes: int) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.tokens += tokens
        self.documents += documents
        self.bytes += text_bytes

    def shard(self) -> Shard:
        return Shard(self.name, self.tokens, self.documents, self.bytes, self.digest.hexdigest())


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[Portion], dict[str, np.ndarray]],
    todo: Iterable[Portion],
    ahead: int,
) -> Iterator[tuple[Portion, dict[str, np.ndarray]]]:
    """Each portion with the tokens of its splits, in the order of the portions.

    At most ``ahead`` portions are read before they are due, which bounds memory.
    """
    waiting: deque[tuple[Portion, Future[dict[str, np.ndarray]]]] = deque()
    for portion in todo:
        waiting.append((portion, pool.submit(work, portion)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    yield from ((first, future.result()) for first, future in waiting)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Each worker is one thread: keep the tokenizer from starting one a core for each of them."""
    before = os.environ.pop("TOKENIZERS_PARALLELISM", None)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
