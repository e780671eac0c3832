"""Copies a folder's growing files to S3 from a thread of its own, and says in a small file how far it is.

What is copied stays on the local disk, so a bucket that is missing, forbidden or gone for a while costs no points and no
time: the copy catches up. A reader (a panel, a notebook) learns of it from `upload.json` in the same folder. Knows no model
and imports no torch; boto3 is imported in the thread.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.base.units import duration
from qlora_helpers.runs.folder import Run

COPY_EVERY_S = 30.0
LAST_COPY_S = 20.0
"""How long the end of training waits for the last copy; a quarter of it where the bucket is away already."""
STATE_FILE = "upload.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CopyState:
    """How far a copy is; `upload.json`.

    Attributes:
        target: `s3://bucket/prefix`.
        last_success: seconds since the epoch when last everything was copied; None before the first time.
        last_error: what S3 or the network said; None where the last look went well.
        failing_since: seconds since the epoch; None where the last look went well.
        pending_bytes: written here and not there yet.
    """

    target: str
    last_success: float | None = None
    last_error: str | None = None
    failing_since: float | None = None
    pending_bytes: int = 0

    def line(self, now: float | None = None) -> str:
        """One line for a panel."""
        now = time.time() if now is None else now
        if self.last_error is not None:
            since = duration(max(0.0, now - (self.failing_since or now)))
            waits = f"{self.pending_bytes / 1024:,.1f} KiB wait in the run folder, training goes on and nothing is lost"
            return f"{self.target} has not taken the events for {since} ({self.last_error}); {waits}"
        if self.last_success is None:
            return f"{self.target}: nothing is copied yet"
        return f"{self.target}: all events were copied {duration(max(0.0, now - self.last_success))} ago"


def copy_state(folder: Path) -> CopyState | None:
    """How far the copy of a folder is; None where there is none, or nothing readable about it."""
    known = {item.name for item in dataclasses.fields(CopyState)}
    try:
        values = read_json(folder / STATE_FILE)
        state = CopyState(**{key: value for key, value in values.items() if key in known})
        state.line()  # the file may come from anywhere: what can't be told is no state
        return state
    except (UserError, TypeError, ValueError, AttributeError, OSError, OverflowError):
        return None


def s3_target(run: Run, config: RunConfig) -> str | None:
    """Where the run's events go on S3, below a folder with its name; None where they stay here."""
    place = config.train.tensorboard
    return f"{place.rstrip('/')}/{run.name}" if place.startswith("s3://") else None


def new_s3_client() -> Any:
    """boto3's S3 client by the usual AWS settings, read afresh: credentials that came later count.

    Short waits, as the thread tries again anyway, and a process that ends should not hang on a bucket that is silent.
    """
    import boto3
    from botocore.config import Config

    settings = Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 2, "mode": "standard"})
    return boto3.session.Session().client("s3", config=settings)


class S3Copy:
    """Copies changed files of a folder to S3 from a thread of its own.

    Files of earlier sessions are copied again, so that what they could not bring over arrives too.

    Args:
        folder: watched; its event files only grow.
        target: `s3://bucket/prefix`.
        client: boto3's S3 client; none makes one by the usual AWS settings, and a new one after a failure.
        every_s: seconds between looks.
    """

    def __init__(self, folder: Path, target: str, *, client: Any = None, every_s: float | None = None) -> None:
        self.folder, self.every_s = folder, COPY_EVERY_S if every_s is None else every_s
        target = target.rstrip("/")
        self.bucket, _, self.prefix = target.removeprefix("s3://").partition("/")
        self.state = CopyState(target)
        self._make_client: Callable[[], Any] = new_s3_client if client is None else lambda: client
        self._client: Any = None
        self._sizes: dict[Path, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="s3-copy", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """What went wrong at the last look."""
        return self.state.last_error

    @property
    def ended(self) -> bool:
        """Whether the thread has made its last copy."""
        return not self._thread.is_alive()

    def close(self, timeout_s: float = LAST_COPY_S) -> None:
        """Makes a last copy and ends the thread; where the bucket is away already, it is not waited for as long."""
        self._end.set()
        self._thread.join(timeout_s if self.problem is None else timeout_s / 4)

    def _loop(self) -> None:
        ended = False
        while not ended:
            ended = self._end.is_set()  # one look more after the end was asked for: the last points
            self._look()
            self._end.wait(self.every_s)

    def _look(self) -> None:
        changes: dict[str, Any] = {"last_error": None, "failing_since": None}
        try:
            if self._copy():
                changes["last_success"] = time.time()
        # Whatever boto3, the network or the disk come up with: it must not end the thread, or the copy never catches up.
        except Exception as error:
            self._client = None
            if self.problem is None:
                log.warning("events could not be copied to s3://%s: %s; training goes on", self.bucket, error)
            since = self.state.failing_since or time.time()
            changes = {"last_error": f"{type(error).__name__}: {error}", "failing_since": since}
        self._tell(changes | {"pending_bytes": self._pending_bytes()})

    def _copy(self) -> int:
        copied = 0
        # In the order of their names, which is that of time, and none after one that failed: TensorBoard reads a file no
        # further once a later one is there.
        for path in sorted(self.folder.rglob("events.*")):
            if self._sizes.get(path) == path.stat().st_size:
                continue
            self._client = self._client or self._make_client()
            # One request with all bytes: boto3's upload_file has a pool of threads that a process waits for when it ends.
            content = path.read_bytes()
            key = f"{self.prefix}/{path.relative_to(self.folder).as_posix()}"
            self._client.put_object(Bucket=self.bucket, Key=key, Body=content)
            self._sizes[path] = len(content)
            copied += 1
        return copied

    def _pending_bytes(self) -> int:
        try:
            sizes = {path: path.stat().st_size for path in self.folder.rglob("events.*")}
        except OSError:
            return self.state.pending_bytes
        return sum(max(0, size - self._sizes.get(path, 0)) for path, size in sizes.items())

    def _tell(self, changes: dict[str, Any]) -> None:
        old, self.state = self.state, dataclasses.replace(self.state, **changes)
        if self.state != old:
            try:
                write_json(self.folder / STATE_FILE, self.state)
            except UserError as error:
                log.warning("%s", error)
