"""SIGTERM and Ctrl-C: finish the step, save, leave with a message and a non-zero exit code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sparse_bitnet.console import say
from sparse_bitnet.core import TrainingError


class TrainingInterruptedError(TrainingError):
    """Training was interrupted by a signal, after a whole step."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as a shell reports it


class StopRequest:
    """Set by a signal; read by the loop after each step."""

    def __init__(self) -> None:
        self.number = 0

    def __bool__(self) -> bool:
        return self.number != 0

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else "a signal on another rank"


@contextmanager
def stop_on_signals(speaks: bool = True) -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; a second one acts at once, as usual.

    Python delivers signals to the main thread alone, so elsewhere this does nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous: dict[int, Any] = {}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        request.number = number
        if speaks:
            say(f"{signal.Signals(number).name}: finishing this step, then saving; again to abort")
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, on_signal)
    try:
        yield request
    finally:
        restore()
