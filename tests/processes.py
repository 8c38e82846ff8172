"""Processes of tests, forked from one that has imported PyTorch and transformers already.

That import takes four seconds of a core, again in every process that is started in another way.
"""

import gc
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import wait

SECONDS = 240
OUT, ERR = "out.txt", "err.txt"
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["sparse_bitnet.train", "transformers.models.qwen2.modeling_qwen2", "torch._dynamo"]
)


def collect_rarely():
    """Leave what is imported out of garbage collections, which take a fifth of the time else."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def run_processes(function, calls):
    """What a function of an importable module returns for each arguments, computed side by side.

    The first that fails, fails all: the others may wait for it.
    """
    found = {}
    processes = []
    try:
        for arguments in calls:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_call, args=(theirs, function, arguments))
            process.start()
            theirs.close()
            processes.append(process)
            found[ours] = None
        pending = list(found)
        while pending:
            ready = wait(pending, SECONDS)
            assert ready, f"{len(pending)} of {len(calls)} processes not ready after {SECONDS} s"
            for connection in ready:
                found[connection], error = connection.recv()
                assert error is None, error
                pending.remove(connection)
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            process.kill()
    return list(found.values())


class Started(context.Process):
    """A function of an importable module at work, whose output goes to files of a directory."""

    def __init__(self, directory, function, arguments):
        super().__init__(target=_into_files, args=(directory, function, arguments))
        self._directory = directory
        for name in (OUT, ERR):
            (directory / name).touch()
        self.start()

    def printed(self):
        return (self._directory / OUT).read_text()

    def complained(self):
        return (self._directory / ERR).read_text()

    def send_signal(self, number):
        os.kill(self.pid, number)


def _into_files(directory, function, arguments):
    collect_rarely()
    for number, name in ((1, OUT), (2, ERR)):
        with (directory / name).open("w") as file:
            os.dup2(file.fileno(), number)
    function(*arguments)


def train_on_ranks(recipe, ranks):
    """What ``torchrun`` does with a recipe, without its own start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(_train_as_rank, [(rank, ranks, port, recipe) for rank in range(ranks)])


def _train_as_rank(rank, ranks, port, recipe):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(n) for name, n in place.items()}}
    from sparse_bitnet.train import load_recipe, train

    train(load_recipe(recipe))


def _call(connection, function, arguments):
    collect_rarely()
    try:
        connection.send((function(*arguments), None))
    except BaseException:
        connection.send((None, traceback.format_exc()))


FRESH = """
import gc, json, os, sys
exec(sys.argv[1])
gc.freeze()
for line in sys.stdin:
    script, arguments, environment, directory, *files = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for number, path in enumerate(files):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
gc.unfreeze()  # libraries look for leaks of theirs when Python ends
os.chdir(directory)
os.environ.update(environment)
sys.argv[1:] = arguments
exec(compile(script, "script", "exec"), {"__name__": "__main__"})
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)  # to tear down what was imported takes a second
"""


class FreshPython:
    """Runs scripts, each in a process that has imported only what is preloaded, made by forking."""

    def __init__(self, directory, preload, **environment):
        self._directory = directory
        command = [sys.executable, "-c", FRESH, preload]
        self._process = subprocess.Popen(
            command, stdin=-1, stdout=-1, text=True, env=os.environ | environment, cwd=directory
        )

    def __call__(self, script, *arguments, cwd=None, **environment):
        out, err = (self._directory / name for name in (OUT, ERR))
        files = ["/dev/null", str(out), str(err)]
        order = [script, [*map(str, arguments)], environment, str(cwd or self._directory), *files]
        print(json.dumps(order), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(script, code, out.read_text(), err.read_text())

    def close(self):
        self._process.stdin.close()
        self._process.wait()
