"""SIGTERM, which a spot interruption, `docker stop` and a cluster's scheduler send some seconds before they kill.

While steps are made it is only noted: the trainer finishes its step, saves and ends. At any other time there is nothing to
save, and the process ends at once. Knows nothing of training.
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
    asked = False
    can_save = False


def asked() -> bool:
    """Whether SIGTERM came since `caught` was last opened."""
    return _State.asked


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """While open, SIGTERM is caught here; only the main thread can. The handler that was there comes back at the end."""
    _State.asked = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def steps() -> Iterator[None]:
    """While open, SIGTERM waits for the trainer to save."""
    _State.can_save = True
    try:
        yield
    finally:
        _State.can_save = False


def _hear(number: int, frame: FrameType | None) -> None:
    if _State.asked:  # it is saving already
        return
    _State.asked = True
    if not _State.can_save:
        raise SystemExit(EXIT_CODE)
