"""A person's requests to a running trainer, `stop` or `save`: each is a file in the run's `requests/`.

A request is asked, then received (the trainer will act on it after the current step or evaluation), then acknowledged with an
answer. This module knows no run: `runs.folder` decides when a request may be made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_record

REQUEST_KINDS = ("stop", "save")
# The heartbeat's thread marks requests as received while the trainer's acknowledges them: one must not overwrite the other.
_WRITING = threading.RLock()


@dataclass(frozen=True)
class Request:
    """What a person asked of a trainer.

    Attributes:
        id: the name of its file, which begins with the time.
        kind: `stop` or `save`.
        session: the training session that it is meant for.
        asked_at, received_at, acknowledged_at: seconds since 1970; None until it happens.
        answer: what the trainer did, or why it did nothing.
    """

    RENAMED: ClassVar[dict[str, str]] = {"heard_at": "received_at"}

    id: str
    kind: str
    session: int
    asked_at: float
    acknowledged_at: float | None = None
    answer: str | None = None
    received_at: float | None = None

    @property
    def stage(self) -> str:
        """How far the request is: `asked`, `received` or `answered`."""
        return "answered" if self.acknowledged_at else "received" if self.received_at else "asked"

    @property
    def is_plausible(self) -> bool:
        """Whether this is a request that a trainer knows."""
        return self.kind in REQUEST_KINDS


class Requests:
    """The requests of one run. Iterating yields all of them, oldest first, and skips files that hold no valid request.

    Args:
        folder: the run's `requests/`, which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[Request]:
        if self.folder.is_symlink():  # it leads to somebody's other files
            return
        for path in sorted(self.folder.glob("[0-9]*.json")):
            with contextlib.suppress(RunError):
                # What a file says of its own name is not believed: the answer is written under it.
                yield dataclasses.replace(read_record(path, Request), id=path.stem)

    def add(self, kind: str, session: int) -> Request:
        """Writes a new request to a session's trainer."""
        request = Request(f"{time.time_ns()}-{kind}", kind, session, time.time())
        self._write(request)
        return request

    def pending(self, session: int) -> list[Request]:
        """Returns the requests that this session has not answered yet, and answers those to earlier sessions as stale."""
        pending = []
        for request in self:
            if request.acknowledged_at is None and request.session == session:
                pending.append(request)
            elif request.acknowledged_at is None and request.session < session:
                self.acknowledge(request, "stale: the session it was meant for has ended")
        return pending

    def receive(self, session: int) -> None:
        """Marks this session's new requests as received, so that a person knows before the current step or evaluation ends."""
        with _WRITING:
            for request in self:
                if request.stage == "asked" and request.session == session:
                    self._write(dataclasses.replace(request, received_at=time.time()))

    def acknowledge(self, request: Request, answer: str) -> None:
        """Answers a request: what was done about it, or why nothing was."""
        with _WRITING:
            now = time.time()
            received = request.received_at or now
            self._write(dataclasses.replace(request, received_at=received, acknowledged_at=now, answer=answer))

    def acknowledge_all(self, answer: str) -> None:
        """Answers every request that is still open, because the trainer ends."""
        with _WRITING:
            for request in self:
                if request.stage != "answered":
                    self.acknowledge(request, answer)

    def _write(self, request: Request) -> None:
        write_json(self.folder / f"{request.id}.json", request, root=self.folder.parent)
