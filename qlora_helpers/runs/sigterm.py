"""SIGTERM, which a spot interruption, `docker stop` and a cluster's scheduler send some seconds before they kill a process.

During training steps the signal is only recorded: the trainer finishes its step, saves and ends. At any other time there is
nothing to save, and the process ends at once. This module knows nothing of training.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
REASON = "stopped and saved: this process was told to end (SIGTERM); train again to go on"


class _State:
    received = False
    is_deferred = False


def received() -> bool:
    """Whether SIGTERM arrived since `catching` was last entered."""
    return _State.received


def pass_on() -> None:
    """Records a SIGTERM that another machine of this training received, as if it had come here."""
    _State.received = True


@contextlib.contextmanager
def catching() -> Iterator[None]:
    """Catches SIGTERM during the block, where this is the main thread; then restores the handler that was there before."""
    _State.received = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only records SIGTERM during the block, so that the trainer can save before it ends."""
    _State.is_deferred = True
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
