"""Signals become requests."""

import os
import signal
import threading

import pytest

from sparse_bitnet.train.signals import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_asks_second_acts(number, capsys):
    before = signal.getsignal(number)
    acted = []
    signal.signal(number, lambda *_: acted.append(True))
    mine = signal.getsignal(number)
    try:
        with stop_on_signals() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
            assert stop.name == number.name
            assert not acted
            os.kill(os.getpid(), number)
            assert acted
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)
    assert f"{number.name}: finishing this step, then saving" in capsys.readouterr().err


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert stop.name == "a signal on another rank"


def test_other_threads_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with stop_on_signals() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
