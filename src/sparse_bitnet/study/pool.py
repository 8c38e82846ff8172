"""Worker processes of a sweep: started, fed, listened to, stopped.

Why not ``concurrent.futures``: its process pool leaves workers behind when the sweep is killed,
a second Ctrl-C waits for the running cell, and a worker that dies takes the whole pool with it.
Here a worker holds one end of a socket pair and ends when the other closes, however that happens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from sparse_bitnet.console import say
from sparse_bitnet.study.cells import Job

GRACE_SECONDS = 20.0
COMMAND = (sys.executable, "-m", "sparse_bitnet.study.worker")

Message = dict[str, Any]


class Worker:
    """One process, our end of its connection, and the job that it runs (None while idle)."""

    def __init__(self, number: int, environment: dict[str, str], log: Path) -> None:
        self.number, self.environment, self.log = number, environment, log
        self.job: Job | None = None
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

    def start(self, job: Job) -> None:
        """Send a job; a process that has died is replaced first."""
        try:
            self.connection.send(job)
        except OSError:
            self.connection.close()
            self.process.wait()
            self._launch()
            self.connection.send(job)
        self.job = job

    def receive(self) -> Message:
        """The next message; a process that died without one gives ``failed`` and ``died``."""
        try:
            message: Message = self.connection.recv()
            return message
        except (EOFError, OSError):
            code = self.process.wait()
            text = f"worker {self.number} died with exit code {code}; its output is in {self.log}"
            return {"failed": text, "died": True}


class Pool:
    """All workers of a sweep: one for each environment of ``places``, with a log file each."""

    def __init__(self, places: list[dict[str, str]], logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        devices = [place.get("CUDA_VISIBLE_DEVICES", "cpu") for place in places]
        self.per_device = max(devices.count(device) for device in devices)
        self.workers = [
            Worker(number, place, logs / f"worker-{number}.log")
            for number, place in enumerate(places)
        ]

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A second Ctrl-C means at once.
        self.stop(0.0 if kind is KeyboardInterrupt else GRACE_SECONDS)

    @property
    def running(self) -> list[Job]:
        return [worker.job for worker in self.workers if worker.job is not None]

    def idle(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.job is None]

    def messages(self, timeout: float) -> list[tuple[Job, Message]]:
        """What has come in: progress (``done``, ``steps``), or a cell's end, which frees its
        worker: ``row``, ``failed`` (with ``died`` if the process is gone) or ``interrupted``."""
        busy = {w.connection: (w, w.job) for w in self.workers if w.job is not None}
        found = []
        for connection in wait(list(busy), timeout):
            assert isinstance(connection, Connection)
            worker, job = busy[connection]
            message = worker.receive()
            found.append((job, message))
            if "done" not in message:
                worker.job = None
        return found

    def stop(self, grace: float = GRACE_SECONDS) -> tuple[list[tuple[Job, Message]], list[Job]]:
        """Ask all workers to save and leave, and wait for ``grace`` seconds.

        Returns:
            ``(ends, left)``: rows and failures of cells that ended meanwhile, and the other cells.
        """
        for worker in self.workers:
            if worker.job is None:
                worker.connection.close()
            else:
                worker.process.terminate()
        until = time.monotonic() + grace
        ends, left = [], []
        while self.running and time.monotonic() < until:
            for job, message in self.messages(until - time.monotonic()):
                if "row" in message or ("failed" in message and "died" not in message):
                    ends.append((job, message))
                elif "done" not in message:
                    left.append(job)
        left += self.running
        for worker in self.workers:
            worker.connection.close()  # those that answered wait for another job
            try:
                worker.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                say(f"worker {worker.number} does not leave; killing it")
                worker.process.kill()
                worker.process.wait()
        self.workers = []
        return ends, left
