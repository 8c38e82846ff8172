"""Atomic writes of files and directories, lock files, and bounded reading of JSON.

Everything is written beside its place under a temporary name, synced to the disk, and renamed. One
rename replaces a file. A directory that exists takes two: were a machine to stop between them, the
old one waits as ``NAME.<process>.old.partial`` and the next write to NAME puts it back first.

Whoever writes holds a lock (``flock``) on the temporary, and the system drops it when the process
ends, however it ends. So a temporary without a lock is a leftover, and the next write removes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from sparse_bitnet.core.errors import OutputError

TEMPORARY_SUFFIX = ".partial"
ASIDE_SUFFIX = f".old{TEMPORARY_SUFFIX}"
LARGEST_JSON = 2**26  # bytes
ADVICE = {
    errno.EEXIST: "something else stands there, choose another name",
    errno.EFBIG: "choose a place where files may be that large",
    errno.EISDIR: "a directory stands where a file is to be written, choose another name",
    errno.ELOOP: "a symbolic link leads to itself, remove it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file stands where a directory is needed, choose another name",
    errno.ENOTEMPTY: "something appeared there meanwhile, choose another name",
    errno.EROFS: "choose another place",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "check the permissions there, or choose another place"
    ),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or choose another place"),
}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # only writes fail so
RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # of safetensors and tokenizers
NUMPY_ERROR = re.compile(r"^\d+ requested and \d+ written$")
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL}
"""What file systems answer that have no locks, or, over the network, none on directories."""


def cache_folder() -> Path:
    """``$SPARSE_BITNET_CACHE``, else ``$XDG_CACHE_HOME/sparse_bitnet``, else that in ``~/.cache``.

    Raises:
        RuntimeError: if there is no home directory either.
    """
    root = os.environ.get("SPARSE_BITNET_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root) if root else Path(base).expanduser() / "sparse_bitnet"


@contextmanager
def locked(path: Path, refusal: Exception, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path``. The lock ends with the process, even when it is killed.

    Where the file system has no locks, a warning says that nothing is locked.

    Args:
        patience: seconds to wait for another holder, which may be about to end.

    Raises:
        Exception: ``refusal``, if another holder is alive.
        OutputError: if the file cannot be made.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        given_up = time.monotonic() + patience
        try:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= given_up:
                        raise refusal from None
                    time.sleep(0.1)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"{path}: this file system has no locks ({error.strerror}); make sure that only "
                "one process works here",
                stacklevel=3,
            )
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While ``path`` is written, errors of the system in our words; not those of other files.

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error  # a file inside
        if cause is None or not (place := _place(cause, path)):
            raise
        at = f" ({place})" if path.is_relative_to(place) and path != place else ""
        raise OutputError(f"{path} cannot be written: {explain(cause)}{at}") from cause


def atomic_file(
    path: str | Path, check: Callable[[], None] | None = None
) -> AbstractContextManager[Path]:
    """Yield a temporary path; on success sync it and rename it to ``path``, else remove it.

    A file that was there hands down its permissions; a symbolic link stays, and its target changes.

    Args:
        check: called right before the rename, to refuse what appeared at ``path`` meanwhile.

    Raises:
        OutputError: if it cannot be written, or a directory, a pipe or a device stands there.
    """
    return _atomic(path, False, check)


def atomic_directory(
    path: str | Path, check: Callable[[], None] | None = None
) -> AbstractContextManager[Path]:
    """:func:`atomic_file` for a directory.

    An existing ``path`` is first renamed aside and removed only once the new one stands. Files in
    it have the mode that new files have, whatever made them.
    """
    return _atomic(path, True, check)


@contextmanager
def _atomic(
    path: str | Path, is_directory: bool, check: Callable[[], None] | None
) -> Iterator[Path]:
    path = Path(os.path.realpath(path))  # unlike resolve, not undone by a link to itself
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    make = partial(temporary.mkdir if is_directory else temporary.touch, exist_ok=True)
    with writing(path):
        _prepare(path, is_directory)
        try:
            with _held(temporary, make):
                usual = temporary.stat().st_mode & 0o666
                yield temporary
                found = (*temporary.rglob("*"), temporary)
                made = [file for file in found if not file.is_symlink()]
                for file in made:
                    if file.is_file():
                        file.chmod(usual)  # safetensors makes files that only their owner may read
                if path.exists():
                    shutil.copymode(path, temporary)
                for file in made:
                    _sync(file)
                replaces = any(path.iterdir()) if path.is_dir() else path.exists()
                if check is not None:
                    check()
                if is_directory and replaces:
                    with _held(path):  # or it would be put back while it stands aside
                        path.rename(path.with_name(f"{path.name}.{os.getpid()}{ASIDE_SUFFIX}"))
                        temporary.rename(path)
                elif is_directory:
                    temporary.rename(path)  # which replaces nothing but an empty directory
                elif replaces or check is None:
                    temporary.replace(path)
                else:
                    _rename_new(temporary, path)
                _sync(path.parent)
        finally:
            if is_directory:
                shutil.rmtree(temporary, ignore_errors=True)
                remove_leftovers(path.parent, path.name)
            else:
                temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path, name: str | None = None) -> list[str]:
    """Remove what killed processes left half written in a directory; return the names.

    Temporaries of living processes stay. A directory that a stopped machine left renamed aside is
    put back where no other has taken its place.

    Args:
        name: only what was to become this file or directory; everything when left out.
    """
    of = ".+" if name is None else re.escape(name)
    wanted = re.compile(rf"({of})\.\d+({re.escape(ASIDE_SUFFIX)}|{re.escape(TEMPORARY_SUFFIX)})")
    removed = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = wanted.fullmatch(path.name)
        if match is None:
            continue
        # Whatever cannot be opened or locked stays: nobody knows whether its writer lives.
        with suppress(OSError), _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            target = directory / match[1]
            if match[2] == ASIDE_SUFFIX and not target.exists():
                path.rename(target)
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(path.name)
    return removed


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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one each line, without lines that a crash cut short or that hold
    something else; none if there is no such file."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                if isinstance(value := json.loads(line), dict):
                    found.append(value)
    return found


def refuse_special(*paths: Path) -> None:
    """Refuse pipes and devices: reading one may never end. Links to plain files are fine.

    Raises:
        ValueError: naming the first that is neither a file nor a directory.
    """
    for path in paths:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a pipe or a device, not a file")


def explain(error: BaseException) -> str:
    """What the system says of a failed write or read, and what to do about it."""
    number = _number(error)
    if number is None:
        return str(error)
    said = str(error) if NUMPY_ERROR.search(str(error)) else os.strerror(number)
    advice = ADVICE.get(number)
    return f"{said}; {advice}" if advice else said


def _number(error: BaseException) -> int | None:
    """The system's number of an error, also where a library tells it in words."""
    if match := RUST_ERROR.search(str(error)):
        return int(match[1])
    if NUMPY_ERROR.search(str(error)):
        return errno.ENOSPC
    return error.errno if isinstance(error, OSError) else None


def _place(error: BaseException, path: Path) -> Path | None:
    """Where writing ``path`` failed: at or in it, its temporary or a folder that it is in. None if
    something else failed."""
    if not isinstance(error, OSError) or error.filename is None:
        return path if _number(error) in NO_ROOM else None  # what else has no name may be a read
    place = Path(os.fsdecode(error.filename))
    of = re.compile(rf"{re.escape(str(path))}(\.\d+(\.old)?{re.escape(TEMPORARY_SUFFIX)})?(/.*)?")
    return place if of.fullmatch(str(place)) or path.is_relative_to(place) else None


def _prepare(path: Path, for_directory: bool) -> None:
    """Refuse what a rename must not replace, and make the directory that ``path`` is in."""
    try:
        refuse_special(path)  # a rename would put a file in the place of the device
    except ValueError as error:
        raise OutputError(f"{error}; choose another name") from None
    number = 0
    if path.is_symlink():  # whose target is itself
        number = errno.ELOOP
    elif path.exists() and path.is_dir() != for_directory:
        number = errno.ENOTDIR if for_directory else errno.EISDIR
    if number:
        raise OSError(number, os.strerror(number), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename a file where nothing may be replaced, which a hard link sees to."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no such links on this file system
        temporary.replace(path)


@contextmanager
def _held(path: Path, make: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Lock a file or directory while it is written, where there are locks; ``make`` makes it.

    Another process may take it for a leftover before it is locked; it is then made again.
    """
    while True:
        make()
        with ExitStack() as stack:
            try:
                descriptor = stack.enter_context(_lock(path, fcntl.LOCK_EX))
                if not os.path.samestat(os.fstat(descriptor), path.stat()):
                    continue
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            yield
            return


@contextmanager
def _lock(path: Path, how: int) -> Iterator[int]:
    # For writing, without which NFS locks nothing; not waiting, which a pipe's reader would.
    access = os.O_RDONLY if path.is_dir() else os.O_RDWR
    descriptor = os.open(path, access | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
