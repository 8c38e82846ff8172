"""Cache of checksums, so that an unchanged token shard is read once and not at every start.

``.checked.json`` holds, for each file, its size, its times of modification and of change when it
was read, its sha256, and its largest token id. It lies beside the files; where that is not allowed,
in the user's cache folder; where neither is, every start reads everything. A copy has another time
of change, so it is read once more. What a disk does to a file without touching its times goes
unseen: :meth:`TokenShards.verify` reads all.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sparse_bitnet.files import cache_folder, read_json, write_text

NAME = ".checked.json"


class File(NamedTuple):
    """A file that was read."""

    state: list[int]
    sha256: str
    largest: int


def state(path: Path) -> list[int]:
    """Size, and times of modification and change in nanoseconds: a write changes one of them."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def recall(directory: Path) -> dict[str, File]:
    """The files of a directory that have not changed since they were read, by name."""
    known = {}
    for path in _places(directory):
        with suppress(OSError, ValueError, TypeError, AttributeError):
            for name, values in read_json(path).items():
                file = File(*values)
                if file.state == state(directory / name) and isinstance(file.largest, int):
                    known[name] = file
    return known


def remember(directory: Path, files: dict[str, File]) -> None:
    """Write them to the first writable place."""
    text = json.dumps(files, indent=1) + "\n"
    for path in _places(directory):
        with suppress(OSError):
            write_text(path, text)
            return


def _places(directory: Path) -> list[Path]:
    places = [directory / NAME]
    with suppress(RuntimeError):  # no home
        key = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:32]
        places.append(cache_folder() / "checked" / f"{key}.json")
    return places
