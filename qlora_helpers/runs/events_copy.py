"""Copies a folder's growing files to S3 from a thread of its own, and reports its progress in a small file.

The files stay on the local disk, so a bucket that is missing, forbidden or unreachable for a while costs neither data nor time:
the copy catches up. A panel or notebook reads from `upload.json` in the same folder how far the copy is. This module knows no
model and imports no torch; boto3 is imported in the thread.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.addresses import redacted
from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.folders import read_regular
from qlora_helpers.base.records import read_record
from qlora_helpers.base.units import duration
from qlora_helpers.runs.buckets import expected_owner, refuse_unconfirmed
from qlora_helpers.runs.folder import Run

COPY_EVERY_S = 30.0
LAST_COPY_S = 20.0
"""How long the end of training waits for the last copy; a quarter of it where the bucket is already unreachable."""
STATE_FILE = "upload.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CopyState:
    """How far a copy is; `upload.json`.

    Attributes:
        target: `s3://bucket/prefix`.
        last_success: when everything was last copied, seconds since 1970; None before the first time.
        last_error: the message of S3 or the network; None after an attempt that succeeded.
        failing_since: seconds since 1970; None after an attempt that succeeded.
        pending_bytes: bytes that are written here and not copied yet.
    """

    target: str
    last_success: float | None = None
    last_error: str | None = None
    failing_since: float | None = None
    pending_bytes: int = 0

    def line(self, now: float | None = None) -> str:
        """Describes the state in one line for a panel."""
        now = time.time() if now is None else now
        if self.last_error is not None:
            since = duration(max(0.0, now - (self.failing_since or now)))
            waiting = (
                f"{self.pending_bytes / 1024:,.1f} KiB wait in the run folder, training goes on and nothing is lost"
            )
            return f"{self.target} has not accepted the events for {since} ({self.last_error}); {waiting}"
        if self.last_success is None:
            return f"{self.target}: nothing has been copied yet"
        return f"{self.target}: all events were copied {duration(max(0.0, now - self.last_success))} ago"


def copy_state(folder: Path) -> CopyState | None:
    """Reads how far the copy of a folder is; None where there is no copy, or its file is damaged."""
    try:
        return read_record(folder / STATE_FILE, CopyState)
    except UserError:
        return None


def s3_target(run: Run, config: RunConfig) -> str | None:
    """Returns where the run's events go on S3, a folder with its name; None where they stay local."""
    place = config.train.tensorboard
    return f"{place.rstrip('/')}/{run.name}" if place.startswith("s3://") else None


def new_s3_client() -> Any:
    """Makes a boto3 S3 client from the usual AWS settings, which are read again, so that new credentials count.

    Its timeouts are short: the thread tries again anyway, and a process that ends must not wait for a bucket that is silent.
    """
    import boto3
    from botocore.config import Config

    settings = Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 2, "mode": "standard"})
    return boto3.session.Session().client("s3", config=settings)


def copy_of(run: Run, config: RunConfig, *, client: Any = None) -> S3Copy | None:
    """Starts the copy of a run's events to its bucket; None where they stay local.

    Raises:
        RunError: nobody has named this bucket on this machine yet.
    """
    target = s3_target(run, config)
    if target is None:
        return None
    refuse_unconfirmed(config)
    return S3Copy(run.events_dir, target, client=client)


class S3Copy:
    """Copies changed files of a folder to S3 from a thread of its own.

    Files of earlier sessions are copied again, so that what those sessions could not copy arrives too.

    Args:
        folder: the folder to watch; its event files only grow.
        target: `s3://bucket/prefix`.
        client: a boto3 S3 client; None makes one from the usual AWS settings, and a new one after a failure.
        every_s: seconds between two attempts; None takes `COPY_EVERY_S`.
        owner: the account that the bucket must belong to; None asks for that of the credentials, unless a client is given.
    """

    def __init__(
        self,
        folder: Path,
        target: str,
        *,
        client: Any = None,
        every_s: float | None = None,
        owner: str | None = None,
    ) -> None:
        self.folder, self.every_s = folder, COPY_EVERY_S if every_s is None else every_s
        target = target.rstrip("/")
        self.bucket, _, self.prefix = target.removeprefix("s3://").partition("/")
        self.state = CopyState(target)
        self._make_client: Callable[[], Any] = new_s3_client if client is None else lambda: client
        self._client: Any = None
        if owner is not None:
            self._owner: dict[str, str] | None = {"ExpectedBucketOwner": owner}
        else:
            self._owner = None if client is None else {}
        self._sizes: dict[Path, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="s3-copy", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """The error of the last attempt; None if it succeeded."""
        return self.state.last_error

    @property
    def ended(self) -> bool:
        """Whether the thread has made its last copy and ended."""
        return not self._thread.is_alive()

    def close(self, timeout_s: float = LAST_COPY_S) -> None:
        """Makes a last copy and ends the thread; it waits a shorter time where the bucket is already unreachable."""
        self._end.set()
        self._thread.join(timeout_s if self.problem is None else timeout_s / 4)

    def _loop(self) -> None:
        ended = False
        while not ended:
            ended = self._end.is_set()  # one more attempt after `close`, for the last points
            self._attempt()
            self._end.wait(self.every_s)

    def _attempt(self) -> None:
        changes: dict[str, Any] = {"last_error": None, "failing_since": None}
        try:
            if self._copy():
                changes["last_success"] = time.time()
        # No error of boto3, the network or the disk may end the thread, or the copy would never catch up.
        except Exception as error:
            self._client = None
            if self.problem is None:
                log.warning(
                    "events could not be copied to s3://%s: %s; training goes on", self.bucket, redacted(str(error))
                )
            since = self.state.failing_since or time.time()
            changes = {"last_error": redacted(f"{type(error).__name__}: {error}"), "failing_since": since}
        self._report(changes | {"pending_bytes": self._pending_bytes()})

    def _copy(self) -> int:
        copied = 0
        # In the order of their names, which is that of time, and none after one that failed: TensorBoard stops reading a file
        # as soon as there is a later one.
        for path, size in self._files():
            if self._sizes.get(path) == size:
                continue
            self._client = self._client or self._make_client()
            if self._owner is None:
                self._owner = expected_owner()
            # One request with all bytes: upload_file uses a pool of threads, and a process that ends would wait for them.
            content = read_regular(path, root=self.folder.parent)
            key = f"{self.prefix}/{path.relative_to(self.folder).as_posix()}"
            self._client.put_object(Bucket=self.bucket, Key=key, Body=content, **self._owner)
            self._sizes[path] = len(content)
            copied += 1
        return copied

    def _files(self) -> list[tuple[Path, int]]:
        """Returns the event files and their sizes: regular files alone, in folders that are no links."""
        found = []
        for parent, _, names in os.walk(self.folder):
            for path in (Path(parent, name) for name in names if name.startswith("events.")):
                seen = path.lstat()
                if stat.S_ISREG(seen.st_mode):
                    found.append((path, seen.st_size))
        return sorted(found)

    def _pending_bytes(self) -> int:
        try:
            return sum(max(0, size - self._sizes.get(path, 0)) for path, size in self._files())
        except OSError:
            return self.state.pending_bytes

    def _report(self, changes: dict[str, Any]) -> None:
        old, self.state = self.state, dataclasses.replace(self.state, **changes)
        if self.state != old:
            try:
                write_json(self.folder / STATE_FILE, self.state, root=self.folder.parent)
            except UserError as error:
                log.warning("%s", error)
