"""Size and CRC-32 of weight files: noted when they are written, compared before they are read.

They stand in the JSON that lies beside the weights (``checkpoint.json`` of a checkpoint,
``sparse_bitnet.json`` of a trained model), and find every bit that flipped on a disk or on the way.
They are no signature: who edits a file on purpose can correct them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sparse_bitnet.core import shown

BLOCK = 1 << 22  # bytes


def checksums(directory: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Name → size in bytes and CRC-32 of a file."""
    found = {}
    for name in names:
        size = crc = 0
        with (directory / name).open("rb") as file:
            while block := file.read(BLOCK):
                size += len(block)
                crc = zlib.crc32(block, crc)
        found[name] = [size, crc]
    return found


def weight_files(directory: Path) -> set[str]:
    """Names of the files that a reader of weights would open there: tensors, and their index."""
    return {path.name for path in directory.glob("*.safetensors*") if path.is_file()}


def find_damage(
    directory: Path,
    expected: Mapping[str, Any],
    read: Callable[[list[str]], Mapping[str, list[int]]],
) -> str:
    """Which weight file is missing, too many, or another one than was written; or the empty string.

    Args:
        read: gives the checksums of files by name, once it is clear that they are there.
    """
    present = weight_files(directory)
    for names, trouble in (
        (expected.keys() - present, "is missing"),
        (present - expected.keys(), "does not belong to it"),
    ):
        if names:
            return f"{shown(min(names))} {trouble}"
    for name, (size, crc) in read(sorted(expected)).items():
        if [size, crc] != expected[name]:
            return f"{name} has {size} bytes and checksum {crc}, expected {shown(expected[name])}"
    return ""
