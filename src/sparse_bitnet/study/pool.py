"""Worker processes of a sweep, each used by one thread of it.

Why no process pool of ``concurrent.futures``: it leaves workers behind when the sweep is killed,
a second Ctrl-C waits for the running cell, and a worker that dies takes the whole pool with it.
Here a worker holds one end of a socket pair and ends when the other closes, however that happens.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from sparse_bitnet.console import say
from sparse_bitnet.study.cells import Job

GRACE_SECONDS = 20.0
COMMAND = (sys.executable, "-m", "sparse_bitnet.study.worker")

Message = dict[str, Any]


class Worker:
    """One process and our end of its connection; ``busy`` while it runs a job."""

    def __init__(self, number: int, environment: dict[str, str], log: Path) -> None:
        self.number, self.environment, self.log = number, environment, log
        self.busy = False
        self._launch()

    def _launch(self) -> None:
        self.connection, theirs = Pipe()
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                # Ctrl-C goes to the sweep alone, which then asks its workers to save.
                start_new_session=True,
            )
        theirs.close()

    def run(self, job: Job) -> Iterator[Message]:
        """Run a job in the process, a new one if it has died.

        Yields:
            Progress (``done``, ``steps``), and the job's end: ``row``, ``failed`` (also where the
            process dies) or ``interrupted``.
        """
        self.busy = True
        try:
            self.connection.send(job)
        except OSError:
            self.connection.close()
            self.process.wait()
            self._launch()
            self.connection.send(job)
        message: Message = {"done": 0}
        while "done" in message:
            try:
                message = self.connection.recv()
            except (EOFError, OSError):
                text = f"worker {self.number} died with exit code {self.process.wait()}"
                message = {"failed": f"{text}; its output is in {self.log}"}
            self.busy = "done" in message
            yield message


@contextmanager
def started(places: list[dict[str, str]], logs: Path) -> Iterator[list[Worker]]:
    """A worker for each environment of ``places``, with a log file each, until this is left."""
    logs.mkdir(parents=True, exist_ok=True)
    workers = [
        Worker(number, place, logs / f"worker-{number}.log") for number, place in enumerate(places)
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.connection.close()  # by which an idle process ends
        for worker in workers:
            try:
                worker.process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                say(f"worker {worker.number} does not leave; killing it")
                worker.process.kill()
                worker.process.wait()
