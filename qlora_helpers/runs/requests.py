"""A person's requests to a running trainer (`stop`, `save`), a file each in the run's `requests/`.

A request is asked, then received (the trainer will act after this step or evaluation), then answered. Knows no run: what may be
asked and when is `runs.folder`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json, write_json

REQUEST_KINDS = ("stop", "save")
# The heartbeat's thread receives requests while the trainer's answers them: what the two write into one file must not cross.
_WRITING = threading.RLock()


@dataclass(frozen=True)
class Request:
    """What a person asked of a trainer.

    Attributes:
        id: the name of its file.
        kind: `stop` or `save`.
        session: the training session that it is meant for.
        asked_at, received_at, acknowledged_at: seconds since 1970; None until it happens.
        answer: what the trainer did, or why not.
    """

    id: str
    kind: str
    session: int
    asked_at: float
    acknowledged_at: float | None = None
    answer: str | None = None
    received_at: float | None = None

    @property
    def stage(self) -> str:
        """`asked`, `received` or `answered`."""
        return "answered" if self.acknowledged_at else "received" if self.received_at else "asked"


class Requests:
    """The requests of one run; iterating gives all of them, oldest first, and skips files that hold none.

    Args:
        folder: the run's `requests/`; need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[Request]:
        for path in sorted(self.folder.glob("[0-9]*.json")):
            with contextlib.suppress(RunError, TypeError):
                yield Request(**read_json(path))

    def add(self, kind: str, session: int) -> Request:
        """Writes a new request to a session."""
        request = Request(f"{time.time_ns()}-{kind}", kind, session, time.time())
        self._write(request)
        return request

    def pending(self, session: int) -> list[Request]:
        """What this session has not yet answered; a request that was meant for an earlier session is answered as stale."""
        pending = []
        for request in self:
            if request.acknowledged_at is None and request.session == session:
                pending.append(request)
            elif request.acknowledged_at is None and request.session < session:
                self.acknowledge(request, "stale: the session it was meant for has ended")
        return pending

    def receive(self, session: int) -> None:
        """Marks this session's new requests as received, so that a person knows before the step or evaluation has ended."""
        with _WRITING:
            for request in self:
                if request.stage == "asked" and request.session == session:
                    self._write(dataclasses.replace(request, received_at=time.time()))

    def acknowledge(self, request: Request, answer: str) -> None:
        """Marks a request as done, or says why not."""
        with _WRITING:
            now = time.time()
            received = request.received_at or now
            self._write(dataclasses.replace(request, received_at=received, acknowledged_at=now, answer=answer))

    def acknowledge_all(self, answer: str) -> None:
        """Answers every request that is still open: the trainer ends."""
        with _WRITING:
            for request in self:
                if request.stage != "answered":
                    self.acknowledge(request, answer)

    def _write(self, request: Request) -> None:
        write_json(self.folder / f"{request.id}.json", request)
