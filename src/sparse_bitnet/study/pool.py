"""Worker processes of a sweep: started, fed, listened to, stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sparse_bitnet.console import say
from sparse_bitnet.study.cells import Cell
from sparse_bitnet.train.config import TrainConfig

GRACE_SECONDS = 20.0
COMMAND = (sys.executable, "-m", "sparse_bitnet.study.worker")


@dataclass
class Job:
    """A cell with all that a worker needs; ``side_by_side`` is set when it starts."""

    key: str
    cell: Cell
    config: TrainConfig
    evaluation: dict[str, Any]
    tokens: int
    side_by_side: int = 1

    def order(self) -> bytes:
        values = {
            "cell": self.cell.to_dict(),
            "config": asdict(self.config),
            "evaluation": self.evaluation,
        }
        return json.dumps(values).encode()


@dataclass
class Running:
    """A cell under way; ``resumed`` of its steps were done before it was started here."""

    job: Job
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    steps: int = 0
    resumed: int = 0

    def seconds_left(self) -> float | None:
        """At the pace so far; None before the first report."""
        each = self.seconds_a_step()
        return None if each is None else each * (self.steps - self.done)

    def seconds_a_step(self) -> float | None:
        """Set-up and compilation included; None before the first report."""
        taken = self.done - self.resumed
        return self.seconds / taken if taken > 0 else None

    @property
    def seconds(self) -> float:
        """Since it was started here."""
        return time.monotonic() - self.started


class Worker:
    """One process and our end of its connection."""

    def __init__(self, number: int, environment: dict[str, str], log: Path) -> None:
        self.number, self.environment, self.log = number, environment, log
        self.running: Running | None = None
        self.launch()

    def launch(self) -> None:
        """Start the process (again)."""
        self.connection, theirs = Pipe()
        self._output: IO[bytes] = self.log.open("ab")
        self.process = subprocess.Popen(
            [*COMMAND, str(theirs.fileno())],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            # Ctrl-C goes to the sweep alone, which then asks its workers to save.
            start_new_session=True,
        )
        theirs.close()

    def close(self) -> None:
        self.connection.close()
        self._output.close()


class Pool:
    """All workers of a sweep.

    Args:
        places: environment of each worker.
        logs: directory for their output, one file each.
    """

    def __init__(self, places: list[dict[str, str]], logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.size = len(places)
        devices = [place.get("CUDA_VISIBLE_DEVICES", "cpu") for place in places]
        self.per_device = max(devices.count(device) for device in devices)
        self._workers = [
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
    def running(self) -> list[Running]:
        return [worker.running for worker in self._workers if worker.running is not None]

    def idle(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.running is None]

    def start(self, worker: Worker, job: Job) -> None:
        """Give an idle worker a cell; one that has died is started anew first."""
        if worker.process.poll() is not None:
            worker.close()
            worker.launch()
        job.side_by_side = self.per_device
        worker.running = Running(job, steps=job.config.schedule.steps)
        try:
            worker.connection.send_bytes(job.order())
        except OSError:  # it died just now
            worker.close()
            worker.launch()
            worker.connection.send_bytes(job.order())

    def reports(self, timeout: float) -> list[tuple[Job, dict[str, Any]]]:
        """Rows, failures and interruptions that have come in; progress is noted here.

        A process that died without a word is reported as a failure of its cell, marked ``died``.
        """
        busy = {w.connection: w for w in self._workers if w.running is not None}
        found = []
        for connection in wait(list(busy), timeout):
            assert isinstance(connection, Connection)
            worker = busy[connection]
            assert worker.running is not None
            message = _receive(worker)
            if "done" in message:
                if not worker.running.done:  # the first step here, which is always reported
                    worker.running.resumed = message["done"] - 1
                worker.running.done, worker.running.steps = message["done"], message["steps"]
                continue
            found.append((worker.running.job, message))
            worker.running = None
        return found

    def stop(
        self, grace: float = GRACE_SECONDS
    ) -> tuple[list[tuple[Job, dict[str, Any]]], list[Job]]:
        """Ask all workers to save and leave, and wait for ``grace`` seconds.

        Returns:
            ``(reports, left)``: rows and failures of cells that came to their end meanwhile, and
            the cells that did not.
        """
        for worker in self._workers:
            if worker.running is None:
                worker.close()
            else:
                worker.process.terminate()
        until = time.monotonic() + grace
        reports, left = [], []
        while self.running and time.monotonic() < until:
            for job, message in self.reports(until - time.monotonic()):
                if "row" in message or ("failed" in message and "died" not in message):
                    reports.append((job, message))
                else:
                    left.append(job)
        left += [running.job for running in self.running]
        for worker in self._workers:
            worker.connection.close()  # those that answered wait for another order
            try:
                worker.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                say(f"worker {worker.number} does not leave; killing it")
                worker.process.kill()
                worker.process.wait()
            worker.running = None
            worker.close()
        self._workers = []
        return reports, left


def _receive(worker: Worker) -> dict[str, Any]:
    try:
        message: dict[str, Any] = json.loads(worker.connection.recv_bytes())
        return message
    except (EOFError, OSError):
        code = worker.process.wait()
        return {
            "failed": f"worker {worker.number} died with exit code {code}; its output is in "
            f"{worker.log}",
            "died": True,
        }
