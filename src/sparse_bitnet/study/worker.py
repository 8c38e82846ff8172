"""A worker process of a sweep: takes cells one after the other, so each shape is compiled once.

Started as ``python -m sparse_bitnet.study.worker FD`` with one end of a socket pair. It ends when
the other end closes, so it never outlives its sweep. Told to stop (SIGTERM), it saves what it
trains; what is trained it measures before it leaves.
"""

from __future__ import annotations

import gc
import signal
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from sparse_bitnet.study.cells import Job
from sparse_bitnet.study.run_cell import run_cell
from sparse_bitnet.train.signals import TrainingInterruptedError

REPORT_SECONDS = 0.5


def serve(connection: Connection) -> None:
    """Run the jobs that arrive until the sweep closes the connection, or a signal says to stop."""
    stops: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stops.append(number)

    signal.signal(signal.SIGTERM, on_signal)  # training has a handler of its own meanwhile
    while not stops:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: dict[str, Any] = {"row": _run(job, connection, stops)}
        except TrainingInterruptedError as error:
            answer = {"interrupted": str(error)}
        except BrokenPipeError:
            return
        except Exception as error:
            with suppress(OSError):  # a full disk, of which the answer tells
                traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        connection.send(answer)
        if "interrupted" in answer:
            return
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run(job: Job, connection: Connection, stops: list[int]) -> dict[str, Any]:
    Path(job.config.run.directory).mkdir(parents=True, exist_ok=True)
    last = 0.0

    def report(done: int, steps: int) -> None:
        nonlocal last
        if stops and done < steps:  # before training could listen
            raise TrainingInterruptedError("stopped while it was being set up", stops[0])
        now = time.monotonic()
        if now - last >= REPORT_SECONDS or done == steps:
            last = now
            connection.send({"done": done, "steps": steps})  # raises once the sweep is gone

    return run_cell(job, report)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
