"""Safetensors files with a checksum for every tensor: written as a stream, verified when read.

A file is eight bytes (the header's length), a JSON header (name → dtype, shape, offsets) and the
tensors' bytes. Ours carry in the header's metadata, beside ``format: pt`` that transformers wants,

    crc32:<name>    the CRC-32 of that tensor's bytes, eight hexadecimal digits

which finds every bit that flipped on a disk or on the way. It is no signature: who edits a file on
purpose can correct the checksum, so what a tensor says is still checked where it is used.

The safetensors library writes a file from tensors that all exist at once. The writer here lays the
file out from shapes alone and takes the tensors one by one in any order, so packing never holds
more than one module.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_bitnet.core import PackedFormatError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_DIMENSIONS = 8
LARGEST_HEADER = 100_000_000  # the safetensors library's own limit
HEADER_ALIGNMENT = 8
BLOCK = 2**22
CHECKSUM_KEY = "crc32:"
REMEDY = "get the file again, or pack the model again"
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: ``start`` and ``end`` are bytes behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Header of a file; ``data`` is the offset of the tensors' bytes."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data: int


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes as eight hexadecimal digits."""
    return f"{_crc(_blocks(tensor)):08x}"


def checksum_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata entries that :func:`verify_checksums` looks for."""
    return {CHECKSUM_KEY + name: checksum(tensor) for name, tensor in tensors.items()}


class TensorFileWriter:
    """Write one file, tensor by tensor, in any order.

    Args:
        path: written in place; make it a temporary name.
        layout: name → (dtype, shape) of every tensor that will come.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._entries, size = _entries(layout)
        self._checksums = dict.fromkeys(layout, "0" * 8)
        self._missing = set(layout)
        self._data = len(_header(self._entries, self._checksums))
        self._file = path.open("wb")
        self._file.truncate(self._data + size)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Its dtype and shape are those of the layout."""
        entry = self._entries[name]
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"{name}: the layout says {entry.dtype} {entry.shape}, not {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        self._file.seek(self._data + entry.start)
        crc = 0
        for block in _blocks(tensor):
            crc = zlib.crc32(block, crc)
            self._file.write(block)
        self._checksums[name] = f"{crc:08x}"
        self._missing.discard(name)

    def close(self) -> None:
        """Write the header, now that the checksums are known."""
        if self._missing:
            raise ValueError(f"tensors were never written: {sorted(self._missing)[:4]}")
        self._file.seek(0)
        self._file.write(_header(self._entries, self._checksums))
        self.abandon()

    def abandon(self) -> None:
        """Close without the header: the file cannot be read."""
        self._file.close()


def file_size(layout: Layout) -> int:
    """Bytes of a file with these tensors, header included."""
    entries, size = _entries(layout)
    return len(_header(entries, dict.fromkeys(layout, "0" * 8))) + size


def _entries(layout: Layout) -> tuple[dict[str, Entry], int]:
    """Where each tensor goes, and the bytes of all of them.

    Wide dtypes first: every tensor then starts at a multiple of its element size, which readers
    that map the file need, and the format allows no gaps.
    """
    entries: dict[str, Entry] = {}
    start = 0
    for name in sorted(layout, key=lambda name: -layout[name][0].itemsize):
        dtype, shape = layout[name]
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = Entry(dtype, shape, start, end)
        start = end
    return entries, start


def _header(entries: Mapping[str, Entry], checksums: Mapping[str, str]) -> bytes:
    metadata = {CHECKSUM_KEY + name: value for name, value in checksums.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    for name, entry in entries.items():
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> Header:
    """Read a file's header and check it against the file's size.

    Raises:
        PackedFormatError: if the file is missing, truncated, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(LARGEST_HEADER, size - 8):
                raise PackedFormatError(
                    f"{path}: the header claims {length} bytes in a file of {size}; the file is "
                    f"truncated or not a safetensors file, {REMEDY}"
                )
            text = file.read(length)
    except OSError as error:
        raise PackedFormatError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    header = parse_json(text, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise PackedFormatError(f"{path}: the header's metadata is not text; {REMEDY}")
    tensors = {name: _entry(path, name, value) for name, value in header.items()}
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise PackedFormatError(
                f"{path}: tensor {name} begins at byte {entry.start} where {end} was expected; the "
                f"header was edited or damaged, {REMEDY}"
            )
        end = entry.end
    if 8 + length + end != size:
        raise PackedFormatError(
            f"{path}: the header describes {8 + length + end} bytes but the file has {size}; it is "
            f"truncated or was edited, {REMEDY}"
        )
    return Header(tensors, metadata, 8 + length)


def verify_checksums(path: Path, header: Header) -> Iterator[str]:
    """Read a file once, a block at a time, yielding the name of each tensor that is intact.

    Raises:
        PackedFormatError: naming the first tensor whose bytes are not those that were written.
    """
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb") as file:
        for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].start):
            expected = header.metadata.get(CHECKSUM_KEY + name)
            if expected is None:
                raise PackedFormatError(
                    f"{path}: tensor {name} has no checksum; the file was not written by "
                    f"sparse-bitnet or was edited, {REMEDY}"
                )
            file.seek(header.data + entry.start)
            found = f"{_crc(_read(file, entry.end - entry.start, buffer)):08x}"
            if found != expected:
                raise PackedFormatError(
                    f"{path}: tensor {name} is not what was written (CRC-32 {found}, expected "
                    f"{expected[:8]}); the file was edited or damaged, {REMEDY}"
                )
            yield name


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object, refusing repeated keys.

    Raises:
        PackedFormatError: naming ``path``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is repeated")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise PackedFormatError(f"{path}: not valid JSON ({error}); {REMEDY}") from None
    return value


def _entry(path: Path, name: str, value: object) -> Entry:
    try:
        if not isinstance(value, dict):
            raise ValueError
        dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
        start, end = value["data_offsets"]
        sizes = (*shape, start, end)
        sane = len(shape) <= MOST_DIMENSIONS and all(
            type(size) is int and 0 <= size < 2**63 for size in sizes
        )
        if not sane or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise PackedFormatError(
            f"{path}: the header's entry of tensor {name[:200]!r} is {str(value)[:200]}, which "
            f"makes no sense; the file was edited or damaged, {REMEDY}"
        ) from None
    return Entry(dtype, shape, start, end)


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, a block at a time; a tensor elsewhere is brought over block by block.

    ``BLOCK`` is a multiple of every element size, so no element is cut.
    """
    flat = tensor.detach().reshape(-1)
    step = BLOCK // tensor.dtype.itemsize
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].cpu().contiguous()
        yield part.view(torch.uint8).numpy().data


def _read(file: BufferedReader, length: int, buffer: memoryview) -> Iterator[memoryview]:
    while length:
        block = buffer[: min(length, len(buffer))]
        count = file.readinto(block)
        if not count:
            return
        yield block[:count]
        length -= count


def _crc(blocks: Iterable[memoryview]) -> int:
    crc = 0
    for block in blocks:
        crc = zlib.crc32(block, crc)
    return crc
