"""SIGTERM: noted while there is something to save, the end at any other time, and no handler is left behind."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from qlora_helpers import termination


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_while_steps_are_made_it_is_noted_as_often_as_it_comes():
    with termination.heard():
        with termination.steps():
            assert not termination.asked()
            terminate()
            assert termination.asked()
        terminate()  # it is saving now
        assert termination.asked()


def test_at_any_other_time_it_ends_the_process_with_a_shell_s_code():
    with pytest.raises(SystemExit) as caught, termination.heard():
        terminate()
    assert caught.value.code == 143


def test_the_handler_that_was_there_comes_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *args: heard.append(args))
    try:
        with pytest.raises(ZeroDivisionError), termination.heard(), termination.steps():
            terminate() or 1 / 0
        assert heard == []
        terminate()
        assert len(heard) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_each_session_begins_anew():
    with termination.heard(), termination.steps():
        terminate()
    assert termination.asked()
    with termination.heard():
        assert not termination.asked()


def test_in_another_thread_nothing_is_changed():
    """As where a notebook trains in one."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with termination.heard():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
