"""Progress bars and messages on standard error: rich on a terminal, plain lines elsewhere.

Results that a program may want to read (tables, generated text) go to standard output.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_LINE_SECONDS = 5.0

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print one line to standard error, without markup."""
    err.print(message, markup=False)


class Task:
    """Progress of one long piece of work; made by :func:`progress`."""

    def __init__(self, description: str, total: int | None, bar: Progress | None) -> None:
        self._description, self._total, self._bar = description, total, bar
        self._done, self._detail = 0, ""
        self._said: tuple[int, str] | None = None
        self._started = self._printed = time.monotonic()
        self._row = bar.add_task(description, total=total, detail="") if bar else None

    def advance(self, steps: int = 1, detail: str | None = None) -> None:
        """Count ``steps`` more as done; ``detail`` is shown behind the bar (loss, tokens/s, …)."""
        self._done += steps
        self._detail = self._detail if detail is None else detail
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, advance=steps, detail=self._detail)
        elif time.monotonic() - self._printed >= PLAIN_LINE_SECONDS:
            self._print_line()

    def finish(self) -> None:
        """Print the final state, unless it took no time."""
        long = time.monotonic() - self._started >= PLAIN_LINE_SECONDS
        if self._bar is None and long and self._said != (self._done, self._detail):
            self._print_line()

    def _print_line(self) -> None:
        self._printed, self._said = time.monotonic(), (self._done, self._detail)
        elapsed = self._printed - self._started
        of = "" if self._total is None else f"/{self._total}"
        left = ""
        if self._total and 0 < self._done <= self._total:
            left = f", {elapsed * (self._total / self._done - 1):.0f} s left"
        detail = f"  {self._detail}" if self._detail else ""
        say(f"{self._description}: {self._done}{of}, {elapsed:.0f} s{left}{detail}")


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Task]:
    """Show a bar with time left on a terminal; elsewhere a line every five seconds and at the end.

    One may stand inside another. Descriptions and details are shown as they are, without markup.
    """
    if not err.is_terminal:
        task = Task(description, total, None)
        try:
            yield task
        finally:
            task.finish()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=err, transient=False) as bar:
        yield Task(description, total, bar)
