"""Text sources: streams of documents that read the same way every time.

| spec                            | documents                                                      |
|---------------------------------|----------------------------------------------------------------|
| ``stdlib``                      | the ``.py`` files of this Python's standard library            |
| ``text:PATH``                   | one a file; a file, a directory or a glob                      |
| ``jsonl:PATH[#FIELD]``          | one a line, plain, ``.gz`` or ``.xz``; field ``text``          |
| ``parquet:PATH[#FIELD]``        | one a row                                                      |
| ``hf:NAME[:CONFIG][:SPLIT][#FIELD]`` | one a row of a Hugging Face dataset, by name or directory |

A field named ``messages`` holds conversations, each a list of ``{"role": …, "content": …}``; any
other field holds text.

Whatever cannot be read stops the run with the file and line: a document that is silently
left out would shift the position of all that follow.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from sparse_bitnet.core.errors import DataError, MissingExtraError
from sparse_bitnet.data.chat import Messages, check_messages

DEFAULT_FIELD, CHAT_FIELD = "text", "messages"
# Tests, installed packages, and encodings: half a million numbers of character tables.
NOT_LIBRARY = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"),
}
HUB_PARTS = 3  # name, config, split
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
PARQUET_ROWS = 256


class Record(NamedTuple):
    """A document not yet parsed."""

    raw: Any  # what Source.parse needs
    place: str  # for messages: a.jsonl, line 3
    position: int  # bytes of the source, as they lie on disk, read when it was found


class Source(ABC):
    """Documents in a fixed order. Iterating yields them as ``str``.

    ``spec`` is the text it was opened from. ``fingerprint`` changes when the content changes; it is
    taken from names, sizes and times of files, so that it costs nothing on terabytes. ``size`` is
    in bytes on disk, as ``Record.position``; None when unknown.
    """

    field = DEFAULT_FIELD  # that holds a document, where the format has fields

    def __init__(self, spec: str, fingerprint: str, size: int | None) -> None:
        self.spec, self.fingerprint, self.size = spec, fingerprint, size

    @property
    def has_chats(self) -> bool:
        """Whether the documents are conversations."""
        return self.field == CHAT_FIELD

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Every document unparsed, so that the ones before a starting point are skipped fast."""

    @abstractmethod
    def parse(self, record: Record) -> str | Messages:
        """The text of one record, or its conversation.

        Raises:
            DataError: naming the place.
        """

    def read(self, start: int = 0) -> Iterator[tuple[str | Messages, Record]]:
        """Documents with the records they stand in, from document number ``start`` on.

        Raises:
            DataError: naming the place of what cannot be read.
        """
        for record in itertools.islice(self.records(), start, None):
            yield self.parse(record), record

    def __iter__(self) -> Iterator[str]:
        for document, record in self.read():
            if not isinstance(document, str):
                raise DataError(
                    f"{record.place}: a conversation, where text is wanted; make shards of it with "
                    "`sparse-bitnet data prepare`"
                )
            yield document


def open_source(spec: str) -> Source:
    """Open a source by its spec (see the module's table).

    Raises:
        DataError: for an unknown kind, a missing path, or a glob or directory without a match.
        MissingExtraError: if ``hf:`` or ``parquet:`` needs a library that is not installed.
    """
    kind, _, where = spec.partition(":")
    if spec == "stdlib":
        return TextFiles(spec, library_files())
    if where and kind == "text":
        return TextFiles(spec, _match(where, spec, ()))
    if where and kind == "jsonl":
        where, field = _split_field(where)
        files = _match(where, spec, (".jsonl", ".jsonl.gz", ".jsonl.xz"))
        return JsonLines(spec, files, field)
    if where and kind == "parquet":
        where, field = _split_field(where)
        return ParquetFiles(spec, _match(where, spec, (".parquet",)), field)
    if where and kind == "hf":
        return HubDataset(spec, *_split_field(where))
    raise DataError(
        f"source {spec!r} is not understood: use stdlib, text:PATH, jsonl:PATH, parquet:PATH "
        "or hf:NAME"
    )


class FileSource(Source):
    """A source of files, in order."""

    def __init__(self, spec: str, files: list[Path], field: str = DEFAULT_FIELD) -> None:
        stats = [path.stat() for path in files]
        self.files, self.field = files, field
        self._sizes = [stat.st_size for stat in stats]
        lines = [
            f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}"
            for path, stat in zip(files, stats, strict=True)
        ]
        stamp = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
        super().__init__(spec, stamp, sum(self._sizes))

    def _with_sizes(self) -> Iterator[tuple[Path, int, int]]:
        """Each file with its size and the sizes before it."""
        before = itertools.accumulate(self._sizes, initial=0)
        return zip(self.files, self._sizes, before, strict=False)


class TextFiles(FileSource):
    """One document a file, UTF-8."""

    def records(self) -> Iterator[Record]:
        for path, size, before in self._with_sizes():
            yield Record(path, str(path), before + size)

    def parse(self, record: Record) -> str | Messages:
        try:
            return record.raw.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{record.place}: not UTF-8 text ({error.reason} at byte {error.start}); convert "
                "it, or name the text files by a glob that leaves it out"
            ) from error
        except OSError as error:
            raise DataError(f"{record.place}: cannot be read: {error.strerror}") from error


class JsonLines(FileSource):
    """One JSON object a line; compression by the file's suffix. Blank lines are passed over."""

    def records(self) -> Iterator[Record]:
        for path, _, before in self._with_sizes():
            try:
                opened = OPENERS.get(path.suffix, contextlib.nullcontext)
                with path.open("rb") as raw, opened(raw) as lines:
                    for number, line in enumerate(lines, start=1):
                        if line.strip():
                            yield Record(line, f"{path}, line {number}", before + raw.tell())
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                raise DataError(
                    f"{path}: the compressed file is truncated or damaged ({error}); fetch it again"
                ) from error
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

    def parse(self, record: Record) -> str | Messages:
        try:
            row = json.loads(record.raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{record.place}: not UTF-8 ({error.reason})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{record.place}: not valid JSON ({error}); each line must be one object, and a "
                "bad last line means the file is cut off"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{record.place}: holds a {type(row).__name__}, not a JSON object")
        return _field_value(row, self.field, record.place)


class ParquetFiles(FileSource):
    """One document a row; only the text column is read, a few hundred rows at a time."""

    def __init__(self, spec: str, files: list[Path], field: str) -> None:
        super().__init__(spec, files, field)
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise MissingExtraError(
                "parquet: needs the pyarrow library: pip install 'sparse-bitnet[data]'"
            ) from error
        self._arrow: Any = pyarrow

    def records(self) -> Iterator[Record]:
        for path, size, before in self._with_sizes():
            try:
                with self._arrow.parquet.ParquetFile(path) as file:
                    names, rows = file.schema_arrow.names, file.metadata.num_rows
                    if self.field not in names:
                        raise DataError(_no_field(str(path), self.field, names))
                    row = 0
                    for batch in file.iter_batches(PARQUET_ROWS, columns=[self.field]):
                        for value in batch.column(0):
                            row += 1
                            yield Record(value, f"{path}, row {row}", before + size * row // rows)
            except (OSError, self._arrow.ArrowException) as error:
                raise DataError(
                    f"{path}: not a readable Parquet file ({error}); fetch it again"
                ) from error

    def parse(self, record: Record) -> str | Messages:
        try:
            value = record.raw.as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{record.place}: not UTF-8 ({error.reason})") from error
        return _field_value({self.field: value}, self.field, record.place)


class HubDataset(Source):
    """A Hugging Face dataset, streamed: nothing but the rows being read lies on this machine.

    ``where`` is ``NAME[:CONFIG][:SPLIT]``; the split is ``train`` when left out, and
    ``NAME::SPLIT`` takes the default configuration. NAME may be a directory of data files.
    """

    def __init__(self, spec: str, where: str, field: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError(
                f"{spec} needs the datasets library: pip install 'sparse-bitnet[data]'"
            ) from error
        parts = where.split(":")
        if len(parts) > HUB_PARTS:
            raise DataError(f"source {spec!r} is not understood: use hf:NAME[:CONFIG][:SPLIT]")
        name, config, split = parts + [""] * (HUB_PARTS - len(parts))
        self.field = field
        try:
            # A stream stores nothing, but the builder makes its cache folder, and HOME may be
            # read-only.
            with TemporaryDirectory() as cache:
                builder = datasets.load_dataset_builder(name, config or None, cache_dir=cache)
                self.rows = builder.as_streaming_dataset(split=split or "train")
        except Exception as error:  # the library raises its own, the hub's and fsspec's errors
            raise DataError(
                f"{spec}: the dataset cannot be opened; check its name, configuration and split, "
                f"and the network ({error})"
            ) from error
        # The builder's hash is the repository's commit, or that of a directory's files.
        super().__init__(spec, f"{builder.hash} {split or 'train'}", None)

    def records(self) -> Iterator[Record]:
        rows = iter(self.rows)
        for number in itertools.count(1):
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # as above
                raise DataError(f"{self.spec}, row {number}: cannot be read: {error}") from error
            yield Record(row, f"{self.spec}, row {number}", 0)

    def parse(self, record: Record) -> str | Messages:
        return _field_value(record.raw, self.field, record.place)


def library_files() -> list[Path]:
    """The sources of this Python's standard library, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        # _sysconfigdata is written by the build and differs between machines.
        if not NOT_LIBRARY.intersection(path.relative_to(root).parts[:-1])
        and not path.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise DataError(f"stdlib: {root} holds no .py files; this Python came without them")
    return files


def _match(where: str, spec: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that a path, directory or glob names, sorted."""
    path = Path(where).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
        files = [p for p in files if not suffixes or p.name.endswith(suffixes)]
        if not files:
            wanted = " or ".join(suffixes) or "text"
            raise DataError(f"{spec}: the directory {path} holds no {wanted} file")
        return sorted(files)
    if glob.has_magic(str(path)):
        anchor = Path(path.anchor)  # "/" of an absolute pattern, "." of a relative one
        found = anchor.glob(str(path.relative_to(path.anchor)))
        files = [p for p in found if p.is_file()]
        if not files:
            raise DataError(f"{spec}: no file matches {path}")
        return sorted(files)
    raise DataError(f"{spec}: {path} does not exist")


def _split_field(where: str) -> tuple[str, str]:
    path, mark, field = where.rpartition("#")
    return (path, field) if mark and path and field else (where, DEFAULT_FIELD)


def _field_value(row: dict[str, Any], field: str, place: str) -> str | Messages:
    """The text in a field; refuses what UTF-8 cannot hold (JSON can escape half a character)."""
    if field not in row:
        raise DataError(_no_field(place, field, list(row)))
    text = row[field]
    if field == CHAT_FIELD:
        return check_messages(text, place)
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} is not valid Unicode ({error.reason} at character "
            f"{error.start})"
        ) from error
    return text


def _no_field(place: str, field: str, fields: list[str]) -> str:
    return (
        f"{place}: no field {field!r}; it holds {', '.join(map(str, fields)) or 'none'}: "
        "name one as PATH#FIELD"
    )
