"""The live table of a sweep: what is done, running and left, with time to go."""

from __future__ import annotations

import time
from types import TracebackType

from rich.live import Live
from rich.table import Table

from sparse_bitnet.console import err, say
from sparse_bitnet.study.pool import Pool, Running

PLAIN_LINE_SECONDS = 15.0


class Board:
    """A table on a terminal, redrawn as it changes; a line every fifteen seconds elsewhere."""

    def __init__(self, name: str, cells: int) -> None:
        self._name, self._cells = name, cells
        self._live = Live(console=err, auto_refresh=False) if err.is_terminal else None
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(
        self,
        finished: int,
        waiting: int,
        failed: dict[str, str],
        pool: Pool,
        seconds_left: float,
        unknown: int,
    ) -> None:
        """Draw the state as it is now; ``unknown`` cells are not in the seconds that are left."""
        now = time.monotonic()
        running = pool.running
        left = f"{_clock(seconds_left)} to go"
        if unknown:
            cells = f"{unknown} cell{'s' if unknown > 1 else ''}"
            left = (
                f"{left} and {cells} of unknown length"
                if seconds_left
                else "time to go not known yet"
            )
        head = (
            f"sweep {self._name}: {finished} of {self._cells} done, {len(running)} running, "
            f"{waiting} waiting"
            + (f", {len(failed)} failed" if failed else "")
            + f", {_clock(now - self._started)} so far, {left}"
        )
        if self._live is not None:
            self._live.update(_table(head, running), refresh=True)
        elif now - self._printed >= PLAIN_LINE_SECONDS:
            self._printed = now
            say(head)


def _table(head: str, running: list[Running]) -> Table:
    table = Table(title=head, title_justify="left", box=None, pad_edge=False)
    for name in ("cell", "steps", "done", "left"):
        table.add_column(name, justify="left" if name == "cell" else "right")
    for one in running:
        left = one.seconds_left()
        share = one.done / one.steps if one.steps else 0.0
        table.add_row(
            str(one.job.cell),
            f"{one.done:,} / {one.steps:,}",
            f"{share:.0%}",
            "…" if left is None else _clock(left),
        )
    return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
