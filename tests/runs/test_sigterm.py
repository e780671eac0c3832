"""SIGTERM and SIGINT: noted while there is something to save, the end at any other time, and no handler is left behind."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from qlora_helpers.runs import sigterm


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_during_steps_the_signal_is_recorded():
    with sigterm.catching():
        with sigterm.deferred():
            assert not sigterm.received()
            terminate()
            assert sigterm.received()
        terminate()  # it is saving now
        assert sigterm.received()


def test_outside_steps_the_signal_ends_the_process_with_code_143():
    with pytest.raises(SystemExit) as caught, sigterm.catching():
        terminate()
    assert caught.value.code == 143


def test_during_steps_an_interrupt_is_recorded_and_a_second_one_ends_them():
    def twice() -> None:
        with sigterm.catching(), sigterm.deferred():
            interrupt()
            assert sigterm.interrupted() and not sigterm.received()
            interrupt()
            raise AssertionError("the second interrupt did not end it")

    with pytest.raises(KeyboardInterrupt):
        twice()
    with sigterm.catching():
        assert not sigterm.interrupted()


def test_outside_steps_an_interrupt_is_as_always():
    def once() -> None:
        with sigterm.catching():
            interrupt()
            raise AssertionError("the interrupt did not end it")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        once()
    assert not sigterm.interrupted()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_earlier_handler_is_restored():
    received = []
    before = signal.signal(signal.SIGTERM, lambda *args: received.append(args))
    try:
        with pytest.raises(ZeroDivisionError), sigterm.catching(), sigterm.deferred():
            terminate() or 1 / 0
        assert received == []
        terminate()
        assert len(received) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_each_session_starts_without_a_signal():
    with sigterm.catching(), sigterm.deferred():
        terminate()
    assert sigterm.received()
    with sigterm.catching():
        assert not sigterm.received()


def test_in_another_thread_nothing_is_changed():
    """As where a notebook trains in one."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with sigterm.catching():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
