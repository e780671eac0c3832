"""What a run is doing, as `status.json` holds it, and whether its trainer still lives. Knows no folder and writes nothing."""

from __future__ import annotations

import dataclasses
import math
import socket
import time
from dataclasses import dataclass
from typing import Any

from qlora_helpers.runs import sigterm

STATES = ("new", "starting", "running", "stopped", "finished", "failed")
LIVE_STATES = ("starting", "running")
HEARTBEAT_STALE_S = 60.0
BY_REQUEST = "stopped and saved by request"
BY_BUDGET = "stopped and saved by its budget: "
INTERRUPTED = "interrupted"
WENT_SILENT = "the trainer's process ended without a word"


@dataclass(frozen=True)
class Status:
    """What a run is doing; `status.json`.

    Attributes:
        state: one of `new`, `starting` (loads model and data), `running`, `stopped`, `finished`, `failed`; a reader may also be
            told `dead`.
        step, max_steps: optimizer steps done, and to do.
        pid, host: the trainer's process.
        session: counts the starts of this run, from 1.
        heartbeat: seconds since the epoch at the last sign of life.
        exit_reason, last_error: why it ended, in a sentence.
        started_at: when this session was started, seconds since the epoch.
        spent_s, spent_usd: wall clock and price of all sessions before this one.
        usd_per_hour: what this session's machine costs; None where that is not known.
        readings: what GPUs, or process and CPU, did at the last heartbeat.
    """

    state: str = "new"
    step: int = 0
    max_steps: int = 0
    pid: int | None = None
    host: str | None = None
    session: int = 0
    heartbeat: float = 0.0
    exit_reason: str | None = None
    last_error: str | None = None
    started_at: float = 0.0
    spent_s: float = 0.0
    spent_usd: float = 0.0
    usd_per_hour: float | None = None
    readings: dict[str, Any] | None = None

    @property
    def is_plausible(self) -> bool:
        """Whether every field is of its kind: the file may come from anywhere."""
        whole = (self.step, self.max_steps, self.session, 0 if self.pid is None else self.pid)
        price = 0.0 if self.usd_per_hour is None else self.usd_per_hour
        numbers = (self.heartbeat, self.started_at, self.spent_s, self.spent_usd, price)
        texts = (self.host, self.exit_reason, self.last_error)
        return (
            self.state in STATES
            and all(type(number) is int and 0 <= number < 2**53 for number in whole)
            and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
            and all(text is None or isinstance(text, str) for text in texts)
            and (self.readings is None or isinstance(self.readings, dict))
        )

    @property
    def is_live(self) -> bool:
        """Whether a trainer is at work, or about to be."""
        return self.state in LIVE_STATES

    @property
    def session_s(self) -> float:
        """Wall clock of this session up to its last sign of life, seconds; loading counts, as it costs."""
        return max(0.0, self.heartbeat - self.started_at) if self.started_at else 0.0

    @property
    def used_s(self) -> float:
        """Wall clock of all sessions, seconds."""
        return self.spent_s + self.session_s

    @property
    def used_usd(self) -> float | None:
        """Price of all sessions; None where no session's price is known."""
        if self.usd_per_hour is None:
            return self.spent_usd or None
        return self.spent_usd + self.usd_per_hour * self.session_s / 3600

    def next_session(self, **values: Any) -> Status:
        """The status of the session after this one, in which nothing is done yet."""
        return dataclasses.replace(
            self,
            state="starting",
            session=self.session + 1,
            started_at=time.time(),
            spent_s=self.used_s,
            spent_usd=self.used_usd or 0.0,
            usd_per_hour=None,
            exit_reason=None,
            last_error=None,
            readings=None,
            host=socket.gethostname(),
            **values,
        )


def stopped_by(reason: str | None) -> str:
    """What stopped a run that was saved before its end, by its `exit_reason`: `by request`, by its budget, or by SIGTERM."""
    if limit := (reason or "").partition(BY_BUDGET)[2]:
        return f"by its budget ({limit})"
    return "by SIGTERM" if reason == sigterm.REASON else "by request"


def is_alive(status: Status) -> bool:
    """Whether the process that wrote this status lives; of another machine's, whether its heart has beaten lately."""
    if status.host != socket.gethostname() or not status.pid:
        return time.time() - status.heartbeat < HEARTBEAT_STALE_S
    import psutil

    try:
        process = psutil.Process(status.pid)
        # A killed child stays in the process table until its parent asks; after a restart another process has the number.
        ended = process.status() == psutil.STATUS_ZOMBIE
        return not ended and process.create_time() < status.heartbeat + HEARTBEAT_STALE_S
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
