"""What a run is doing, as `status.json` holds it, and whether its trainer is still alive. Knows no folder and writes nothing."""

from __future__ import annotations

import dataclasses
import socket
import time
from dataclasses import dataclass
from typing import Any

from qlora_helpers.runs import sigterm

STATES = ("new", "starting", "running", "stopped", "finished", "failed")
LIVE_STATES = ("starting", "running")
PHASES = ("loading", "training", "evaluating", "saving", "certifying")
HEARTBEAT_STALE_S = 60.0
BY_REQUEST = "stopped and saved by request"
BY_BUDGET = "stopped and saved by its budget: "
BY_INTERRUPT = "stopped and saved when it was interrupted"
INTERRUPTED = "interrupted"
WENT_SILENT = "the trainer's process ended without reporting why"


@dataclass(frozen=True)
class Status:
    """What a run is doing; `status.json`.

    Attributes:
        state: one of `new`, `starting` (model and data are loaded), `running`, `stopped`, `finished`, `failed`; `Run.status` also
            returns `dead`.
        phase: what a live trainer does now, one of `PHASES`; empty where it did not say.
        step, max_steps: optimizer steps done, and optimizer steps of the whole run.
        pid, host: the trainer's process and machine.
        session: how often the run was started, from 1.
        heartbeat: time of the last sign of life, seconds since 1970.
        exit_reason, last_error: why the session ended, in a sentence.
        warning: what is wrong with the result of a session that ended well, such as a certificate that failed; empty if nothing is.
        started_at: time at which this session was started, seconds since 1970.
        spent_s, spent_usd: wall clock and price of all earlier sessions.
        usd_per_hour: price of this session's machines together; None where it is unknown.
        readings: of the GPUs, or of the process, at the last heartbeat.
    """

    state: str = "new"
    phase: str = ""
    step: int = 0
    max_steps: int = 0
    pid: int | None = None
    host: str | None = None
    session: int = 0
    heartbeat: float = 0.0
    exit_reason: str | None = None
    last_error: str | None = None
    warning: str = ""
    started_at: float = 0.0
    spent_s: float = 0.0
    spent_usd: float = 0.0
    usd_per_hour: float | None = None
    readings: dict[str, Any] | None = None

    @property
    def is_plausible(self) -> bool:
        """Whether the state is known and no count is negative: what the types don't say."""
        return self.state in STATES and min(self.step, self.max_steps, self.session, self.pid or 0) >= 0

    @property
    def is_live(self) -> bool:
        """Whether a trainer is running or starting."""
        return self.state in LIVE_STATES

    @property
    def session_s(self) -> float:
        """Wall clock of this session up to its last sign of life, seconds; loading counts, since it costs as much."""
        return max(0.0, self.heartbeat - self.started_at) if self.started_at else 0.0

    @property
    def used_s(self) -> float:
        """Wall clock of all sessions, seconds."""
        return self.spent_s + self.session_s

    @property
    def used_usd(self) -> float | None:
        """Price of all sessions, USD; None where no session's price is known."""
        if self.usd_per_hour is None:
            return self.spent_usd or None
        return self.spent_usd + self.usd_per_hour * self.session_s / 3600

    @property
    def session_usd(self) -> float | None:
        """Price of this session, USD; None where it is unknown."""
        return None if self.usd_per_hour is None else self.usd_per_hour * self.session_s / 3600

    def next_session(self, **values: Any) -> Status:
        """Returns the status with which the session after this one begins."""
        return dataclasses.replace(
            self,
            state="starting",
            phase="loading",
            session=self.session + 1,
            started_at=time.time(),
            spent_s=self.used_s,
            spent_usd=self.used_usd or 0.0,
            usd_per_hour=None,
            exit_reason=None,
            last_error=None,
            warning="",
            readings=None,
            host=socket.gethostname(),
            **values,
        )


def stopped_by(reason: str | None) -> str:
    """Says what stopped a run before its last step, by its `exit_reason`: a request, its budget, or SIGTERM."""
    if limit := (reason or "").partition(BY_BUDGET)[2]:
        return f"by its budget ({limit})"
    if reason in (BY_INTERRUPT, INTERRUPTED):
        return "when it was interrupted"
    return "by SIGTERM" if reason == sigterm.REASON else "by request"


def is_alive(status: Status) -> bool:
    """Whether the process that wrote this status is alive; on another machine, whether its heartbeat is recent."""
    if status.host != socket.gethostname() or not status.pid:
        return time.time() - status.heartbeat < HEARTBEAT_STALE_S
    import psutil

    try:
        process = psutil.Process(status.pid)
        # A killed child stays in the process table until its parent waits for it; after a restart another process may have its id.
        ended = process.status() == psutil.STATUS_ZOMBIE
        return not ended and process.create_time() < status.heartbeat + HEARTBEAT_STALE_S
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
