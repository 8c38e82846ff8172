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
from collections.abc import Iterator
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
        """The next message; a process that died without one gives ``failed``."""
        try:
            message: Message = self.connection.recv()
            return message
        except (EOFError, OSError):
            code = self.process.wait()
            text = f"worker {self.number} died with exit code {code}; its output is in {self.log}"
            return {"failed": text}


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
        for worker in self.workers:
            worker.connection.close()  # an idle process ends by that
        for worker in self.workers:
            try:
                # Those that run had their time to save; a second Ctrl-C means at once.
                at_once = worker.job is not None or kind is KeyboardInterrupt
                worker.process.wait(0.1 if at_once else GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                say(f"worker {worker.number} does not leave; killing it")
                worker.process.kill()
                worker.process.wait()

    @property
    def running(self) -> list[Job]:
        return [worker.job for worker in self.workers if worker.job is not None]

    def idle(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.job is None]

    def messages(self, timeout: float) -> list[tuple[Job, Message]]:
        """What has come in: progress (``done``, ``steps``), or a cell's end, which frees its
        worker: ``row``, ``failed`` or ``interrupted``."""
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

    def stop(self, grace: float = GRACE_SECONDS) -> Iterator[tuple[Job, Message]]:
        """Ask all workers to save and leave, and wait for ``grace`` seconds.

        Yields:
            :meth:`messages` meanwhile; then ``interrupted`` for each cell that has not ended.
        """
        for worker in self.workers:
            if worker.job is not None:
                worker.process.terminate()
        until = time.monotonic() + grace
        while self.running and (left := until - time.monotonic()) > 0:
            for job, message in self.messages(left):
                # Asked to stop while it started, a process dies.
                yield job, {"interrupted": message["failed"]} if "failed" in message else message
        yield from [(job, {"interrupted": "not saved in time"}) for job in self.running]
