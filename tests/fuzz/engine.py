"""Damage files at random, read them, and see that nothing worse than an error of ours comes of it.

``main`` runs in a process of its own, so that a crash, a hang and a memory blow-up are seen from
outside; by hand ``PYTHONPATH=tests python tests/fuzz/engine.py OUT NAME:FIRST:COUNT ...``.

For each named reader (``reader_NAME.py`` beside this file, or a path) it builds clean files,
damages a copy of them once for each seed, and reads it. The property, for every seed:

- reading raises a :class:`SparseBitNetError` with a message of at most 1000 characters, or returns;
- a reader that returns has checked what it loaded itself (see each reader's own words): a mutation
  may leave a file valid with other values, and a flipped bit of a float is no error;
- it takes less than ten seconds of a core, or a minute, and one more GiB of address space than
  the process had;
- no code from the files has run, and no file outside the directory was opened by Python.

``OUT`` gets a line of JSON for each failure and each finished reader, and the seed at work.
"""

import faulthandler
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from mutations import Mutation, Sandbox, mutate

SECONDS, WAITING = 10, 60
MEMORY = 2**30
LONGEST_MESSAGE = 1000


class HangError(BaseException):
    """Reading took too long. Not an Exception, so that no reader takes it for damage."""


class Watch:
    """Notices when Python opens a file of ``box.secret``."""

    def __init__(self):
        self.secret, self.opened = "", ""
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.secret and event == "open" and isinstance(arguments[0], str):
            path = os.path.normpath(Path.cwd() / arguments[0])
            if path.startswith(self.secret):
                self.opened = path


def load_reader(name):
    path = Path(name) if name.endswith(".py") else Path(__file__).with_name(f"reader_{name}.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fuzz(name, seeds, root, watch, tell):
    """Damage and read once for each seed; tell of every failure, and of the end."""
    from sparse_bitnet.core import SparseBitNetError

    reader = load_reader(name)
    box = Sandbox(root / Path(name).stem, getattr(reader, "NAMED", False))
    box.clean.mkdir(parents=True)
    reader.build(box.clean)
    shutil.copytree(box.clean, box.secret)
    for directory in (box.clean, box.secret):
        (directory / "code.py").write_text(f"import os\nos.mkdir({str(box.trace)!r})\n")
    reader.read(copy_of(box), Mutation("nothing"))  # and all its imports before the limit
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, resource.RLIM_INFINITY))
    watch.secret = str(box.secret) + os.sep
    accepted = getattr(reader, "ACCEPTED", ())
    counts = {"refused": 0, "loaded": 0}
    for seed in seeds:
        tell({"at": f"{name} {seed}"})
        watch.secret, secret = "", watch.secret
        directory = copy_of(box)
        mutation = mutate(random.Random(f"{Path(name).stem} {seed}"), box)
        watch.secret = secret
        where = f"{name}, seed {seed}: {mutation.told}"

        def fail(what, detail="", where=where):
            tell({"failure": f"{where}: {what}", "detail": detail})

        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(WAITING)
        faulthandler.dump_traceback_later(2 * WAITING, exit=True)  # where no signal gets through
        try:
            reader.read(directory, mutation)
            counts["loaded"] += 1
        except (SparseBitNetError, *accepted) as error:
            counts["refused"] += 1
            if len(str(error)) > LONGEST_MESSAGE:
                fail(f"a message of {len(str(error))} characters", str(error)[:500])
        except HangError:
            fail(f"more than {SECONDS} s", traceback.format_exc()[-3000:])
        except BaseException as error:
            fail(f"not an error of ours: {type(error).__name__}", traceback.format_exc()[-3000:])
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
        if box.trace.exists():
            box.trace.rmdir()
            fail("code from the files ran")
        if watch.opened:
            fail(f"opened {watch.opened}")
            watch.opened = ""
    watch.secret = ""
    tell({"finished": name, "seeds": len(seeds), **counts})
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def copy_of(box):
    shutil.rmtree(box.damaged, ignore_errors=True)
    shutil.copytree(box.clean, box.damaged)
    return box.damaged


def main(out, *orders):
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def hang(_number, _frame):
        raise HangError

    signal.signal(signal.SIGALRM, hang)
    signal.signal(signal.SIGPROF, hang)
    watch = Watch()
    with Path(out).open("w") as file, tempfile.TemporaryDirectory() as root:

        def tell(event):
            file.write(json.dumps(event) + "\n")
            file.flush()

        for order in orders:
            name, first, count = order.split(":")
            fuzz(name, range(int(first), int(first) + int(count)), Path(root), watch, tell)


if __name__ == "__main__":
    sys.stdin.close()  # nobody is there to be asked
    main(*sys.argv[1:])
