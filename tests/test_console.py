"""What a person sees: plain lines in a log, a bar on a terminal, nothing on standard output."""

import io
import re

import pytest
from rich.console import Console

from sparse_bitnet import console


@pytest.fixture
def clock(monkeypatch):
    """Time in a list: tests move it themselves."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch):
    screen = io.StringIO()
    fake = Console(file=screen, force_terminal=True, width=120, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "err", fake)
    return screen


def test_say_writes_one_line_to_standard_error(capsys):
    long = "a path that is longer than a terminal is wide, " * 5 + "[bold]as it is[/bold] [/x]"
    console.say(long)
    captured = capsys.readouterr()
    assert captured.err == f"{long}\n"
    assert captured.out == ""


def test_plain_lines_every_five_seconds(capsys, clock):
    with console.progress("train", 10) as task:
        for step in range(10):
            clock[0] += 2
            task.advance(detail=f"loss {9 - step}")
    assert capsys.readouterr().err.splitlines() == [
        "train: 3/10, 6 s, 14 s left  loss 7",
        "train: 6/10, 12 s, 8 s left  loss 4",
        "train: 9/10, 18 s, 2 s left  loss 1",
        "train: 10/10, 20 s, 0 s left  loss 0",
    ]


def test_plain_lines_without_a_total(capsys, clock):
    with console.progress("read [x]") as task:
        clock[0] += 6
        task.advance(250)
    assert capsys.readouterr().err.splitlines() == ["read [x]: 250, 6 s"]


def test_short_work_says_nothing(capsys, clock):
    with console.progress("quick", 2) as task:
        task.advance()
        clock[0] += 4
        task.advance()
    assert capsys.readouterr().err == ""


def test_work_that_fails_says_how_far_it_came(capsys, clock):
    with pytest.raises(KeyboardInterrupt), console.progress("train", 10) as task:
        task.advance(3)
        clock[0] += 60
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "train: 3/10, 60 s, 140 s left\n"


def test_more_done_than_announced(capsys, clock):
    with console.progress("count", 2) as task:
        clock[0] += 6
        task.advance(5)
    assert "left" not in capsys.readouterr().err


@pytest.mark.parametrize("total", [0, 1, None])
def test_nothing_done(capsys, clock, total):
    with console.progress("wait", total):
        clock[0] += 9
    assert "left" not in capsys.readouterr().err


def test_a_bar_on_a_terminal(terminal, capsys):
    with console.progress("verify [/x] [bold]", 3) as task:
        task.advance(3, "loss [1.0] {x}")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "verify [/x] [bold]" in text
    assert "3/3" in text
    assert "loss [1.0] {x}" in text
    assert capsys.readouterr().out == ""


def test_bars_inside_bars(terminal):
    with console.progress("outer", 2) as outer:
        with console.progress("inner") as inner:
            inner.advance(7)
            console.say("in between")
        outer.advance()
    for text in ("outer", "inner", "in between"):
        assert text in terminal.getvalue()
