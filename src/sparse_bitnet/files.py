"""Writing files so that a crash leaves the old one or the new one, and reading with suspicion.

Everything is written beside its place under a temporary name, synced to the disk, and renamed. One
rename replaces a file. A directory that exists takes two: were a machine to stop between them, the
old one waits as ``NAME.<process>.old.partial`` and the next write to NAME puts it back first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".partial"
ASIDE_SUFFIX = f".old{TEMPORARY_SUFFIX}"
LARGEST_JSON = 2**26  # bytes


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success sync it and rename it to ``path``, else remove it.

    A file that was there hands down its permissions; a symbolic link stays, and its target changes.
    """
    path = Path(os.path.realpath(path))  # unlike resolve, not undone by a link to itself
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        _say_where(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory; on success sync its files and let it take the place of ``path``.

    An existing ``path`` is first renamed aside and removed only once the new one stands.

    Raises:
        NotADirectoryError: if ``path`` is a file.
    """
    path = Path(os.path.realpath(path))  # unlike resolve, not undone by a link to itself
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; choose another name for the directory")
    _put_back(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    aside = path.with_name(f"{path.name}.{os.getpid()}{ASIDE_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        if path.exists():
            shutil.copymode(path, temporary)
            path.rename(aside)
        temporary.rename(path)
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        _say_where(error, path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(path)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """The value in a JSON file of at most ``largest`` bytes.

    Raises:
        OSError: if there is none, or it cannot be read.
        ValueError: if it is no plain file, longer, or not JSON in UTF-8; the text says
            which.
    """
    refuse_special(path)
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"longer than {largest} bytes")
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def refuse_special(*paths: Path) -> None:
    """Refuse pipes and devices: reading one may never end. Links to plain files are fine.

    Raises:
        ValueError: naming the first that is neither a file nor a directory.
    """
    for path in paths:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a pipe or a device, not a file")


def _say_where(error: OSError, path: Path) -> None:
    """Name the file in an error that names none, as when a write finds no space."""
    if error.filename is not None:
        return
    if error.errno is None:  # numpy counts what it wrote
        error.args = (f"{path} cannot be written: {error}",)
    else:
        error.filename = str(path)


def _put_back(path: Path) -> None:
    """Where a replacement stopped between its two renames, undo the first."""
    aside = re.compile(rf"{re.escape(path.name)}\.\d+{re.escape(ASIDE_SUFFIX)}")
    if not path.exists():
        for other in path.parent.iterdir():
            if aside.fullmatch(other.name):
                other.rename(path)
                return


def _sync(path: Path) -> None:
    if path.is_symlink():
        return  # lives in its directory, which is synced
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
