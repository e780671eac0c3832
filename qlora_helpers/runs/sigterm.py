"""SIGTERM, which a spot interruption, `docker stop` and a cluster's scheduler send some seconds before they kill a process, and
SIGINT, by which a person interrupts a cell or a command.

During training steps a signal is only recorded: the trainer finishes its step, saves and ends. At any other time there is
nothing to save, and the process ends at once, or the cell does. A second interrupt ends the steps at once, too. This module knows
nothing of training.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
REASON = "stopped and saved: this process was told to end (SIGTERM); train again to go on"


class _State:
    received = False
    interrupted = False
    is_deferred = False


def received() -> bool:
    """Whether SIGTERM arrived since `catching` was last entered."""
    return _State.received


def interrupted() -> bool:
    """Whether a person interrupted training steps (SIGINT) since `catching` or `deferred` was last entered."""
    return _State.interrupted


def pass_on() -> None:
    """Records a SIGTERM that another machine of this training received, as if it had come here."""
    _State.received = True


@contextlib.contextmanager
def catching() -> Iterator[None]:
    """Catches both signals during the block, where this is the main thread; then restores the handlers that were there before."""
    _State.received = _State.interrupted = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _handle), signal.signal(signal.SIGINT, _handle_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only records the signals during the block, so that the trainer can save before it ends."""
    _State.is_deferred, _State.interrupted = True, False
    try:
        yield
    finally:
        _State.is_deferred = False


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.received:  # the trainer is saving already
        return
    _State.received = True
    if not _State.is_deferred:
        raise SystemExit(EXIT_CODE)


def _handle_interrupt(number: int, frame: FrameType | None) -> None:
    if _State.interrupted or not _State.is_deferred:
        raise KeyboardInterrupt
    _State.interrupted = True
    if sys.stderr is not None and sys.stderr.isatty():  # in a notebook the panel shows how it goes on
        os.write(2, b"\nstopping: the step is finished and saved first; Ctrl+C again ends at once, without saving\n")
