"""Token shards: the tokens of a corpus as flat integer files, read by memory map.

A directory holds ``index.json`` and the shards it names. A shard is its tokens and nothing else,
little-endian uint16 (vocabulary of at most 65,536) or uint32, documents one after the other. The
index is written last, so a directory that has one is complete.

Documents of text (version 1) are each ended by the EOS token, and every token is learned. Those of
conversations (version 2) end as their template says; behind each token stand two bytes: whether an
answer holds it, which alone is learned, and whether a document begins with it.

Every file is read once to see that its sha256 is the index's; see :mod:`sparse_bitnet.data.checked`
for how that is remembered.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from sparse_bitnet.console import Task, progress
from sparse_bitnet.core.errors import DataError, shown
from sparse_bitnet.data import checked
from sparse_bitnet.files import read_json

INDEX = "index.json"
TEXT_VERSION, CHAT_VERSION = 1, 2
SMALL_VOCABULARY = 1 << 16
LARGEST_VOCABULARY = 1 << 31
OPEN_SHARDS = 256  # each memory map keeps a file descriptor, of which a process has about 1000
BLOCK = 1 << 23  # bytes


Count = Annotated[int, Field(strict=True, ge=1, lt=1 << 62)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FORBID = ConfigDict(extra="forbid")


@with_config(FORBID)
@dataclass(frozen=True)
class Shard:
    """One file: its name inside the directory, what it holds, and the sha256 of its bytes."""

    # One plain file name: no directory, no parent, nothing absolute.
    file: Annotated[str, Field(pattern=r"^[0-9]{1,9}\.bin$")]
    tokens: Count
    documents: Count
    bytes: Count
    sha256: Digest

    def __post_init__(self) -> None:
        if self.documents > self.tokens:
            raise ValueError(f"shard {self.file} has more documents than tokens")


@with_config(FORBID)
@dataclass(frozen=True)
class Index:
    """What ``index.json`` holds. It is read as hostile: files are named by it."""

    format: Literal["sparse-bitnet token shards"]
    version: Annotated[int, Field(strict=True, ge=TEXT_VERSION, le=CHAT_VERSION)]
    dtype: str
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=LARGEST_VOCABULARY)]
    eos_id: Annotated[int, Field(strict=True, ge=0)]
    tokenizer_hash: Digest
    shards: Annotated[list[Shard], Field(min_length=1)]

    def __post_init__(self) -> None:
        dtype, names = token_dtype(self.vocab_size).name, [shard.file for shard in self.shards]
        if self.dtype != dtype:
            raise ValueError(f"dtype is {shown(self.dtype)}, that vocabulary is kept as {dtype}")
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id is {self.eos_id}, beyond the vocabulary")
        if len({*names}) < len(names):
            raise ValueError("a shard is named twice")


def validated(kind: Any, values: Any) -> Any:
    """A dataclass from JSON values.

    Raises:
        ValueError: saying what is wrong and where.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        one = error.errors(include_url=False)[0]
        where = ".".join(str(part)[:50] for part in one["loc"])
        raise ValueError(f"{where or 'it'} is {shown(one['input'])}: {one['msg']}") from None


def token_dtype(vocab_size: int, answers: bool = False) -> np.dtype[Any]:
    """uint16 where every token id fits, else uint32; little-endian on every machine. With answers:
    the same as ``id``, and the bytes ``answer`` and ``first``."""
    ids = np.dtype("<u2" if vocab_size <= SMALL_VOCABULARY else "<u4")
    return np.dtype([("id", ids), ("answer", "u1"), ("first", "u1")]) if answers else ids


def index_text(
    shards: Sequence[Shard],
    *,
    tokenizer_hash: str,
    vocab_size: int,
    eos_id: int,
    answers: bool = False,
) -> str:
    """What ``index.json`` holds."""
    index = Index(
        "sparse-bitnet token shards",
        CHAT_VERSION if answers else TEXT_VERSION,
        token_dtype(vocab_size).name,
        vocab_size,
        eos_id,
        tokenizer_hash,
        list(shards),
    )
    return json.dumps(asdict(index), indent=1) + "\n"


class TokenShards:
    """A directory of token shards, opened by its index and checked against the files on disk.

    The first opening reads every shard (about a gigabyte a second), later ones only those whose
    size or times have changed.

    Raises:
        DataError: if the index or a shard is missing, truncated, edited or not one of ours.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        self.vocab_size = index.vocab_size  # every token id is below it
        self.eos_id = index.eos_id  # ends each document of text
        self.tokenizer_hash = index.tokenizer_hash  # see tokenizer.tokenizer_hash
        self.has_answers = index.version == CHAT_VERSION  # conversations: answers are learned
        self.dtype = token_dtype(self.vocab_size, self.has_answers)
        self.shards = index.shards
        self.verify(anew=False)
        self._ends = list(accumulate(shard.tokens for shard in self.shards))
        self.total_tokens = self._ends[-1]
        self.total_documents = sum(shard.documents for shard in self.shards)
        self.total_bytes = sum(shard.bytes for shard in self.shards)  # UTF-8, of the text
        self._map = lru_cache(maxsize=OPEN_SHARDS)(self._open_map)

    @property
    def totals(self) -> dict[str, int]:
        return {
            "tokens": self.total_tokens,
            "documents": self.total_documents,
            "bytes": self.total_bytes,
            "shards": len(self.shards),
        }

    def tokens(self, start: int, count: int) -> np.ndarray:
        """``count`` tokens from position ``start`` on, as int64 ``[count]``, across shards."""
        return self.windows([start], count)[0]

    def windows(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Tokens ``[start, start + length)`` of each start: int64 ``[len(starts), length]``.

        Raises:
            DataError: if a window reaches beyond the tokens.
        """
        return _ids(self._stored(starts, length)).astype(np.int64)

    def marks(
        self, starts: Sequence[int] | np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the same tokens: which are learned, and which begin a document (of text: those that
        follow an EOS, and the very first); bool ``[len(starts), length]`` each.

        The first token of a document is not learned: nothing stands before it.
        """
        stored = self._stored(starts, length)
        if self.has_answers:
            first = stored["first"] != 0
            return (stored["answer"] != 0) & ~first, first
        first = np.empty(stored.shape, dtype=bool)
        first[:, 1:] = stored[:, :-1] == self.eos_id
        before = np.maximum(np.asarray(starts, dtype=np.int64) - 1, 0)
        first[:, :1] = self.windows(before, 1) == self.eos_id
        first[:, :1] |= np.asarray(starts)[:, None] == 0
        return ~first, first

    def document_starts(self) -> np.ndarray:
        """Where the documents of conversations begin: int64, ascending."""
        parts = (np.flatnonzero(self._map(n)["first"]) for n in range(len(self.shards)))
        begins = [0, *self._ends[:-1]]
        return np.concatenate([part + begin for part, begin in zip(parts, begins, strict=True)])

    def _stored(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Windows as they lie in the files."""
        out = np.empty((len(starts), length), dtype=self.dtype)
        for row, start in zip(out, map(int, starts), strict=True):
            if start < 0 or length < 0 or start + length > self.total_tokens:
                raise DataError(
                    f"{self.path}: tokens {start} to {start + length} asked of {self.total_tokens}"
                )
            number = bisect_right(self._ends, start)
            filled = 0
            while filled < length:
                shard = self._map(number)
                offset = start + filled - (self._ends[number] - len(shard))
                piece = shard[offset : offset + length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                number += 1
        return out

    def verify(self, anew: bool = True) -> None:
        """Check every file: its size, its sha256, and that every token id is below ``vocab_size``.

        Args:
            anew: read all of them, also those that are remembered as checked.

        Raises:
            DataError: naming the first shard that fails.
        """
        found = find_damage(self.path, self.shards, self.dtype, self.vocab_size, anew)
        if found:
            raise DataError(f"{self.path / found[0].file}: {found[1]}")

    def require_tokenizer(self, tokenizer_hash: str, where: str = "the model's tokenizer") -> None:
        """Refuse another tokenizer than the one that made the tokens, by a DataError."""
        if tokenizer_hash != self.tokenizer_hash:
            raise DataError(
                f"{self.path}: shard of the wrong vocabulary: made by tokenizer "
                f"{self.tokenizer_hash[:12]}, but {where} is {tokenizer_hash[:12]}; prepare the "
                "data with that tokenizer"
            )

    def require_vocabulary(self, vocab_size: int, where: str = "the model") -> None:
        """Refuse fewer embedding rows than the shards have tokens, by a DataError."""
        if vocab_size < self.vocab_size:
            raise DataError(
                f"{self.path}: shard of the wrong vocabulary: its tokenizer has {self.vocab_size} "
                f"tokens, {where} has {vocab_size}; prepare the data with the model's tokenizer"
            )

    def _open_map(self, number: int) -> np.ndarray:
        path = self.path / self.shards[number].file
        # A plain view of the map: slicing np.memmap itself costs microseconds.
        return np.asarray(np.memmap(path, dtype=self.dtype, mode="r"))


def find_damage(
    directory: Path,
    shards: Sequence[Shard],
    dtype: np.dtype[Any],
    vocab_size: int,
    anew: bool = False,
) -> tuple[Shard, str] | None:
    """The first shard whose file is not what was written, and what is wrong with it.

    Args:
        anew: read also the files that are remembered as checked.
    """
    for shard in shards:
        path, wanted = directory / shard.file, shard.tokens * dtype.itemsize
        if not path.is_file():
            return shard, "named by the index, but missing; prepare the data again"
        size = path.stat().st_size
        if size != wanted:
            return shard, (
                f"{size} bytes, but the index says {wanted} ({shard.tokens} tokens of "
                f"{dtype.itemsize} bytes); truncated or edited, prepare the data again"
            )
    known = {} if anew else checked.recall(directory)
    unread = [shard for shard in shards if shard.file not in known]
    blocks = sum(-(-shard.tokens * dtype.itemsize // BLOCK) for shard in unread)
    with progress(f"check {directory}", blocks) as bar:
        for shard in unread:
            path = directory / shard.file
            state = checked.state(path)  # before it is read: a change meanwhile is seen later
            known[shard.file] = checked.File(state, *_read(path, dtype, bar))
    for shard in shards:
        file = known[shard.file]
        if file.sha256 != shard.sha256:
            return shard, (
                "its sha256 is not the index's; the file was damaged or edited, prepare the data "
                "again"
            )
        if file.largest >= vocab_size:
            return shard, (
                f"holds token id {file.largest}, but the vocabulary has {vocab_size}; prepare the "
                "data again with --overwrite"
            )
    if unread:
        checked.remember(directory, known)
    return None


def _read(path: Path, dtype: np.dtype[Any], bar: Task) -> tuple[str, int]:
    """sha256 and largest token id of a file."""
    digest, largest = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK - BLOCK % dtype.itemsize):
            digest.update(block)
            largest = max(largest, int(_ids(np.frombuffer(block, dtype)).max()))
            bar.advance()
    return digest.hexdigest(), largest


def _ids(stored: np.ndarray) -> np.ndarray:
    return stored if stored.dtype.names is None else stored["id"]


def _read_index(directory: Path) -> Index:
    path = directory / INDEX
    if not directory.is_dir():
        raise DataError(
            f"{directory}: no such directory; make it with `sparse-bitnet data prepare`"
        )
    if not path.is_file():
        raise DataError(
            f"{path}: missing; the directory is not token shards, or preparing them was "
            "interrupted: run `sparse-bitnet data prepare` again"
        )
    try:
        values = read_json(path)
    except ValueError as error:
        raise DataError(f"{path}: {error}; prepare the data again") from error
    try:
        index: Index = validated(Index, values)
    except ValueError as error:
        raise DataError(
            f"{path}: not an index of token shards, or edited: {error}; prepare the data again"
        ) from error
    return index
