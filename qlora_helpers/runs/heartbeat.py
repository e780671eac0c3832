"""A trainer's signs of life, sent from a thread of its own, also while a model loads, an evaluation runs or a step takes minutes.

The thread writes a heartbeat with readings of the GPUs into `status.json`, marks requests as received, and reports activity to
SageMaker Studio. The training loop never waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine import studio, telemetry
from qlora_helpers.runs import claims
from qlora_helpers.runs.folder import Run

REQUESTS_EVERY_S = 0.5
HEARTBEAT_EVERY_S = 5.0
STUDIO_EVERY_S = 60.0
log = logging.getLogger(__name__)
elsewhere: list[dict[str, Any]] = []
"""The last readings of the other machines that train this run, each with its `host` (`training.peers`)."""


@contextlib.contextmanager
def sending_heartbeats(run: Run, session: int) -> Iterator[None]:
    """Sends heartbeats during the block.

    Args:
        run: the run that this process trains.
        session: the session whose requests are marked as received.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_send, args=(run, session, ended), name=f"heartbeat of {run.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


def readings() -> dict[str, Any]:
    """Reads the GPUs, or this process and those that train with it where there is no GPU, for a line of progress or a heartbeat."""
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
    found: dict[str, Any] = {"process": _known_readings(process)}
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:  # their parent has started nothing else
        others = map(telemetry.read_process, telemetry.children_of(os.getppid()))
        found["processes"] = [_known_readings(each) for each in others if each is not None]
    return found


def _known_readings(process: telemetry.ProcessReading) -> dict[str, float]:
    return {"rss_gib": round(process.rss_gib, 3), "cpu_percent": round(process.cpu_percent, 1)}


def readings_everywhere() -> dict[str, Any]:
    """Reads this machine, and adds what the other machines of this training have last reported of theirs.

    Returns:
        As `readings`; with several machines each GPU and each process has its `host`.
    """
    found = readings()
    if not elsewhere:
        return found
    machines = [{"host": socket.gethostname()} | found, *map(dict, elsewhere)]
    for each in machines:
        each.setdefault("processes", [each["process"]] if "process" in each else [])
    for kind in ("gpus", "processes"):
        listed = [{"host": each["host"]} | one for each in machines for one in each.get(kind, ())]
        found |= {kind: listed} if listed else {}
    return found


def _send(run: Run, session: int, ended: threading.Event) -> None:
    last_heartbeat = last_report = last_touch = float("-inf")
    has_warned = False
    while not ended.wait(REQUESTS_EVERY_S):
        now = time.monotonic()
        try:
            run.requests.receive(session)
            if now - last_heartbeat >= HEARTBEAT_EVERY_S:
                last_heartbeat = now
                found = readings_everywhere()
                if not ended.is_set():
                    run.set_status(readings=found)
            if now - last_touch >= claims.TOUCH_S:
                last_touch = now
                claims.touch()
            if now - last_report >= STUDIO_EVERY_S:
                last_report = now
                studio.report_activity()
        except (UserError, OSError) as error:  # a full disk must not end this thread
            if not has_warned:
                log.warning("the heartbeat could not be written: %s", error)
            has_warned = True
