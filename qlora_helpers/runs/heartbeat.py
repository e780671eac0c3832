"""A trainer's signs of life, from a thread of its own: also while a model loads or an evaluation runs.

It updates `status.json` with readings of the GPUs, marks requests as received, and tells SageMaker Studio that somebody is
at work. The training loop waits for none of it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine import studio, telemetry
from qlora_helpers.runs.folder import Run

LISTEN_S = 0.5
BEAT_S = 5.0
STUDIO_S = 60.0
log = logging.getLogger(__name__)


@contextlib.contextmanager
def beating(run: Run, session: int) -> Iterator[None]:
    """Beats for the block.

    Args:
        run: the run that this process trains.
        session: whose requests are received.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(run, session, ended), name=f"heart of {run.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


def readings() -> dict[str, Any]:
    """GPU readings, or the process's own where there is no GPU, for a line of progress or a heartbeat."""
    gpus = telemetry.read_gpus()
    if gpus:
        return {
            "gpus": [
                {
                    "name": gpu.name,
                    "memory_used_gib": gpu.memory_used_gib,
                    "memory_total_gib": gpu.memory_total_gib,
                    "load": gpu.utilisation_percent,
                }
                for gpu in gpus
            ]
        }
    process = telemetry.read_process()
    if process is None:
        return {}
    return {"process": {"rss_gib": round(process.rss_gib, 3), "cpu_percent": round(process.cpu_percent, 1)}}


def _beat(run: Run, session: int, ended: threading.Event) -> None:
    beaten = told = float("-inf")
    complained = False
    while not ended.wait(LISTEN_S):
        now = time.monotonic()
        try:
            run.requests.receive(session)
            if now - beaten >= BEAT_S:
                beaten = now
                found = readings()
                if not ended.is_set():
                    run.set_status(readings=found)
            if now - told >= STUDIO_S:
                told = now
                studio.say_busy()
        except (UserError, OSError) as error:  # a full disk must not end the training from here
            if not complained:
                log.warning("no sign of life could be given: %s", error)
            complained = True
