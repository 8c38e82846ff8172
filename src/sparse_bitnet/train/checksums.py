"""Size and CRC-32 of weight files: noted when they are written, compared before they are read.

They stand in the JSON that lies beside the weights (``checkpoint.json`` of a checkpoint,
``sparse_bitnet.json`` of a trained model), and find every bit that flipped on a disk or on the way.
They are no signature: who edits a file on purpose can correct them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_bitnet.core import shown

BLOCK = 1 << 22  # bytes


def checksum(path: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]


def weight_files(directory: Path) -> set[str]:
    """Names of the files that a reader of weights would open there: tensors, and their index."""
    return {path.name for path in directory.glob("*.safetensors*") if path.is_file()}


def names_differ(directory: Path, expected: Mapping[str, Any]) -> str:
    """Which weight file is missing or too many, or the empty string."""
    present = weight_files(directory)
    for names, trouble in (
        (expected.keys() - present, "is missing"),
        (present - expected.keys(), "does not belong to it"),
    ):
        if names:
            return f"{shown(min(names))} {trouble}"
    return ""


def sums_differ(found: Mapping[str, list[int]], expected: Mapping[str, Any]) -> str:
    """Which of the files that were read is another one than was written, or the empty string."""
    for name, (size, crc) in found.items():
        if [size, crc] != expected[name]:
            return f"{name} has {size} bytes and checksum {crc}, expected {shown(expected[name])}"
    return ""
