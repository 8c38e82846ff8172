"""Safetensors files with a checksum for every tensor: written, read, verified.

Beside ``format: pt``, which transformers wants, the header's metadata has

    crc32:<name>    the CRC-32 of that tensor's bytes, eight hexadecimal digits

which finds every bit that flipped on a disk or on the way. It is no signature: who edits a file on
purpose can correct the checksum, so what a tensor holds is still checked where it is used.

The safetensors library reads, but does not write: it puts metadata into another order each time,
and the same model should give the same file.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_bitnet.core import PackedFormatError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
HEADER_ALIGNMENT = 8
CHECKSUM_KEY = "crc32:"
REMEDY = "get the file again, or pack the model again"


@dataclass(frozen=True)
class TensorFile:
    """Contents of a file: tensors whose memory is the mapped file, and the header's metadata."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file, in place: make ``path`` a temporary name."""
    with path.open("wb") as file:
        file.write(_header(tensors, checksum_metadata(tensors)))
        for name in _order(tensors):
            file.write(_bytes(tensors[name]))


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a file with these tensors, which may be on the meta device."""
    checksums = {CHECKSUM_KEY + name: "0" * 8 for name in tensors}
    return len(_header(tensors, checksums)) + sum(tensor.nbytes for tensor in tensors.values())


def checksum_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata entries that :func:`verify_checksums` looks for."""
    return {CHECKSUM_KEY + name: _checksum(tensor) for name, tensor in tensors.items()}


def read_tensors(path: Path) -> TensorFile:
    """Open a file; its header must describe exactly the bytes that follow.

    Raises:
        PackedFormatError: if the file is missing, truncated, or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
            return TensorFile(path, tensors, file.metadata() or {})
    except OSError as error:
        raise PackedFormatError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    except Exception as error:  # the library's own, and PyTorch's for absurd shapes
        raise PackedFormatError(
            f"{path}: truncated, damaged or not a safetensors file ({str(error)[:200]}); {REMEDY}"
        ) from None


def verify_checksums(file: TensorFile) -> None:
    """Compare every tensor's bytes with its checksum.

    Raises:
        PackedFormatError: naming a tensor whose bytes are not those that were written.
    """
    for name, tensor in file.tensors.items():
        expected = file.metadata.get(CHECKSUM_KEY + name)
        if expected is None:
            raise PackedFormatError(
                f"{file.path}: tensor {name} has no checksum; the file was not written by "
                f"sparse-bitnet or was edited, {REMEDY}"
            )
        found = _checksum(tensor)
        if found != expected:
            raise PackedFormatError(
                f"{file.path}: tensor {name} is not what was written (CRC-32 {found}, expected "
                f"{expected[:8]}); the file was edited or damaged, {REMEDY}"
            )


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names, wide dtypes first: each tensor then starts at a multiple of its element size.

    Readers that map the file need that, and the format allows no gaps.
    """
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


def _header(tensors: Mapping[str, Tensor], checksums: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **checksums}}
    end = 0
    for name in _order(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(_bytes(tensor)):08x}"
