"""A crash leaves the old file or the new one, never half of one."""

import copy
import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sparse_bitnet import files
from sparse_bitnet.core import ConfigError, OutputError
from sparse_bitnet.files import (
    LARGEST_JSON,
    atomic_directory,
    atomic_file,
    locked,
    read_json,
    refuse_special,
    remove_leftovers,
    write_text,
)


def fill(temporary, text, is_directory):
    if is_directory:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text(text)
    else:
        temporary.write_text(text)


def content(path):
    return (path / "inner" / "file" if path.is_dir() else path).read_text()


WRITERS = pytest.mark.parametrize(
    ("writer", "is_directory"), [(atomic_file, False), (atomic_directory, True)]
)


@WRITERS
def test_makes_and_replaces(tmp_path, writer, is_directory):
    target = tmp_path / "new" / "parents" / "target"
    for text in ("first", "second"):
        with writer(target) as temporary:
            assert temporary.parent == target.parent
            fill(temporary, text, is_directory)
        assert content(target) == text
    assert list(target.parent.iterdir()) == [target]


@WRITERS
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room"),
        (OSError("8 requested and 3 written"), "8 requested and 3 written; make room"),
        (SafetensorError("I/O error: Quota (os error 122)"), "Disk quota exceeded; make room"),
        (PermissionError(errno.EACCES, "denied", "{target}.7.partial/inner"), "Permission denied"),
    ],
)
def test_an_error_says_where_and_what_to_do(tmp_path, writer, is_directory, error, said):
    target = tmp_path / "target"
    if isinstance(error, PermissionError):
        error = PermissionError(*error.args, error.filename.format(target=target))
    match = re.escape(f"{target} cannot be written: {said}")
    with pytest.raises(OutputError, match=match), writer(target):
        raise copy.copy(error)
    with (
        pytest.raises(OutputError, match=match),
        atomic_directory(target) as temporary,
        writer(temporary / "inner"),  # the name that the user gave counts
    ):
        raise copy.copy(error)
    assert list(tmp_path.iterdir()) == []


@WRITERS
@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "other"),
        FileNotFoundError(errno.ENOENT, "No such file", "{}side/file"),
        OSError("no tokenizer in 'x'"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        RuntimeError("No such file or directory (os error 2)"),
    ],
    ids=str,
)
def test_an_error_of_something_else_stays(tmp_path, writer, is_directory, error):
    out = tmp_path / "out"
    if isinstance(error, OSError) and error.filename is not None:
        error = FileNotFoundError(*error.args, error.filename.format(out))
    with pytest.raises(type(error)) as raised, writer(out):
        raise error
    assert raised.value is error


@WRITERS
def test_a_full_disk(tmp_path, writer, is_directory):
    """A limit of the size of files stands for it: the system refuses the write that crosses it."""
    script = (
        "import resource, sys\n"
        "from sparse_bitnet.files import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"with {writer.__name__}(sys.argv[1]) as temporary:\n"
        f"    file = temporary / 'file' if {is_directory} else temporary\n"
        "    file.write_text('x' * 2000)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{tmp_path / 'out'} cannot be written: File too large; choose a place" in run.stderr
    assert list(tmp_path.iterdir()) == []


@WRITERS
def test_what_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, writer, is_directory):
    """Neither before the last check nor between that and the rename."""
    target = tmp_path / "target"

    def appear():
        if is_directory:
            target.mkdir()
        fill(target, "of another", is_directory)

    def check():
        if target.exists():
            raise ConfigError("it exists")

    with pytest.raises(ConfigError, match="it exists"), writer(target, check) as temporary:
        fill(temporary, "ours", is_directory)
        appear()
    assert content(target) == "of another"
    shutil.rmtree(target) if is_directory else target.unlink()
    with pytest.raises(OutputError, match="choose another name"), writer(target, appear) as path:
        fill(path, "ours", is_directory)
    assert content(target) == "of another"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", no_links)
    with atomic_file(tmp_path / "target", lambda: None) as temporary:
        temporary.write_text("text")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("target", "text")]


@WRITERS
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failing_writer_leaves_the_old_and_nothing_else(tmp_path, writer, is_directory, error):
    target = tmp_path / "target"
    for expected in ([], [target]):
        with pytest.raises(error), writer(target) as temporary:
            fill(temporary, "half", is_directory)
            raise error
        assert list(tmp_path.iterdir()) == expected
        if not expected:
            with writer(target) as temporary:
                fill(temporary, "old", is_directory)
    assert content(target) == "old"


def test_a_directory_loses_files_that_the_new_one_lacks(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    with atomic_directory(target) as temporary:
        (temporary / "new").touch()
    assert [file.name for file in target.iterdir()] == ["new"]


@WRITERS
def test_killed_while_writing(tmp_path, writer, is_directory):
    """SIGKILL gives no chance to clean up; the old content stands all the same."""
    target = tmp_path / "target"
    with writer(target) as temporary:
        fill(temporary, "old", is_directory)
    script = (
        "import sys; from pathlib import Path\n"
        f"from sparse_bitnet.files import {writer.__name__} as writer\n"
        "with writer(sys.argv[1]) as temporary:\n"
        f"    file = temporary / 'file' if {is_directory} else temporary\n"
        "    file.write_text('half')\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert content(target) == "old"
    with writer(target) as temporary:
        fill(temporary, "new", is_directory)
    assert content(target) == "new"

    assert list(tmp_path.iterdir()) == [target]


@WRITERS
def test_leftovers_of_the_living_stay(tmp_path, writer, is_directory):
    """Whatever process number stands in their names: numbers are used again, locks are not."""
    target = tmp_path / "target"
    dead = tmp_path / f"target.{os.getppid()}.partial"  # of a process that lives, but not with it
    foreign = [tmp_path / name for name in ("target.partial", "target.1.part", "notes.2.partial")]
    with writer(target) as temporary:
        fill(temporary, "first", is_directory)
        alive = temporary.rename(tmp_path / "target.4711.partial")
        for path in (dead, *foreign):
            path.mkdir()
        with writer(target) as second:
            fill(second, "second", is_directory)
        assert alive.exists() and not dead.exists()
        assert remove_leftovers(tmp_path) == ["notes.2.partial"]
        assert content(target) == "second"
        alive.rename(temporary)
    assert content(target) == "first"
    assert sorted(tmp_path.iterdir()) == sorted([target, *foreign[:2]])


def test_a_leftover_that_cannot_be_locked_stays(tmp_path, monkeypatch):
    """As on a file system without locks, where nobody knows who lives."""
    (tmp_path / "target.4711.partial").touch()

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    write_text(tmp_path / "target", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "target.4711.partial"]
    with pytest.warns(UserWarning, match="has no locks"), locked(tmp_path / "lock", ValueError()):
        pass


def test_a_lock_dies_with_its_process(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from sparse_bitnet.files import locked\n"
        "with locked(Path(sys.argv[1]), ValueError()):\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    lock = tmp_path / "new" / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", script, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(ValueError, match="in use"), locked(lock, ValueError("in use")):
            raise AssertionError("must not be entered")
        process.send_signal(signal.SIGKILL)
        with locked(lock, ValueError("in use"), patience=10.0):
            pass


@pytest.mark.parametrize("victim", ["temporary", "aside"])
def test_a_directory_survives_a_stop_between_the_renames(tmp_path, monkeypatch, victim):
    target = tmp_path / "target"
    with atomic_directory(target) as temporary:
        fill(temporary, "old", True)
    original = Path.rename

    def failing(self, to):
        is_last = Path(to) == target and "old" not in self.name
        if is_last == (victim == "temporary"):
            raise OSError("no space left on device")
        return original(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space left"), atomic_directory(target) as temporary:
        fill(temporary, "new", True)
    monkeypatch.undo()
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_next_write_puts_back_what_a_stopped_machine_left_aside(tmp_path):
    aside = tmp_path / "target.4711.old.partial"
    other = tmp_path / "target.else.4711.old.partial"
    for directory in (aside, other):
        directory.mkdir()
        fill(directory, "old", True)
    with pytest.raises(ValueError, match="stop"), atomic_directory(tmp_path / "target"):
        raise ValueError("stop")
    assert content(tmp_path / "target") == "old"
    assert not aside.exists()
    assert other.exists()  # another directory's


@WRITERS
def test_permissions_are_handed_down(tmp_path, writer, is_directory):
    target = tmp_path / "target"
    mode = 0o700 if is_directory else 0o640
    with writer(target) as temporary:
        fill(temporary, "old", is_directory)
    target.chmod(mode)
    with writer(target) as temporary:
        fill(temporary, "new", is_directory)
    assert stat.S_IMODE(target.stat().st_mode) == mode


@WRITERS
@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_new_files_have_the_usual_permissions(tmp_path, writer, is_directory, umask):
    """Also those that a library makes for their owner alone, as safetensors does."""
    usual, ours, private = (tmp_path / name for name in ("usual", "ours", "private"))
    private.touch(0o600)
    before = os.umask(umask)
    try:
        if is_directory:
            usual.mkdir()
        fill(usual, "text", is_directory)
        with writer(ours) as temporary:
            fill(temporary, "text", is_directory)
            (temporary / "inner" / "file" if is_directory else temporary).chmod(0o600)
            if is_directory:
                (temporary / "link").symlink_to(private)
    finally:
        os.umask(before)
    for path in (usual, *usual.rglob("*")):
        assert (ours / path.relative_to(usual)).stat().st_mode == path.stat().st_mode
    assert stat.S_IMODE(private.stat().st_mode) == 0o600


def test_a_symbolic_link_stays_one(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_pipe_or_device_behind_a_link_is_not_replaced(tmp_path):
    """As root a rename would put a file in the place of /dev/zero, for the whole machine."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(OutputError, match="pipe is a pipe or a device, not a file"):
            write_text(path, "text")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, pipe]


def test_a_directory_does_not_replace_a_file(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    with (
        pytest.raises(OutputError, match="a file stands where a directory is needed, choose an"),
        atomic_directory(target),
    ):
        raise AssertionError("must not be entered")
    assert target.read_text() == "precious"


def test_a_file_does_not_replace_a_directory(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(OutputError, match="a directory stands where a file is to be written"):
        write_text(tmp_path / "target", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a descriptor is")
@WRITERS
def test_content_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch, writer, is_directory):
    events = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def logged_fsync(descriptor):
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def logged(original):
        def move(self, to):
            events.append(("rename", Path(to).name))
            result = original(self, to)
            return result

        return move

    monkeypatch.setattr(files.os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged(rename))
    monkeypatch.setattr(Path, "replace", logged(replace))
    with writer(tmp_path / "target") as temporary:
        fill(temporary, "text", is_directory)
    own = f"target.{os.getpid()}.partial"
    contents = (
        [("sync", "inner"), ("sync", "file"), ("sync", own)] if is_directory else [("sync", own)]
    )
    assert sorted(events[:-2]) == sorted(contents)
    assert events[-2:] == [("rename", "target"), ("sync", tmp_path.name)]


def test_text_is_utf_8(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    write_text(tmp_path / "text", "γ ≈ ½")
    assert (tmp_path / "text").read_bytes() == "γ ≈ ½".encode()


def test_names_with_pattern_characters(tmp_path):
    target = tmp_path / "a[b]*.c"
    for text in ("first", "second"):
        with atomic_directory(target) as temporary:
            fill(temporary, text, True)
    assert content(target) == "second"


def test_json_is_read_with_suspicion(tmp_path):
    path = tmp_path / "value.json"
    path.write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(path) == {"é": [1, None]}
    for data, message in (
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON: 'utf-8'"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"1" * 5000, "not valid JSON: Exceeds the limit"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    with path.open("ab") as file:
        file.truncate(LARGEST_JSON + 1)
    with pytest.raises(ValueError, match="longer than 67108864 bytes"):
        read_json(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_json(path)


def test_what_never_ends_is_not_read(tmp_path):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    refuse_special(tmp_path, tmp_path / "file", tmp_path / "link", tmp_path / "nothing")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for name in ("zero", "pipe"):
        with pytest.raises(ValueError, match=f"{name} is a pipe or a device, not a file"):
            read_json(tmp_path / name)


@WRITERS
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("loop", "Too many levels of symbolic links; a symbolic link leads to itself, remove it"),
        ("loop/out", "File exists; something else stands there, choose another name .*loop"),
        ("file/out", "File exists; something else stands there, choose another name .*file"),
        ("n" * 255, "File name too long; choose a shorter name"),
        ("closed/out", "Permission denied; check the permissions"),
    ],
)
def test_odd_places(tmp_path, writer, is_directory, place, said):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir(mode=0o500)
    if place == "closed/out" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    with pytest.raises(OutputError, match=f"cannot be written: ({said})"), writer(tmp_path / place):
        raise AssertionError("must not be entered")
    if len(place) < 255:
        lock = locked(tmp_path / place / "lock", ValueError())
        with pytest.raises(OutputError, match="cannot be written"), lock:
            raise AssertionError("must not be entered")
    assert len(list(tmp_path.iterdir())) == 3
