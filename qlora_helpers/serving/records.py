"""Who serves what on this machine: a file a server, in a folder that only this account can enter, beside the server's token.

The token is in a file so that it is in no command line, no log and no notebook. A record whose process has ended is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.private import private_folder
from qlora_helpers.base.records import read_record

FOLDER = "qlora-serving"


@dataclass(frozen=True)
class Serving:
    """A server that runs.

    Attributes:
        folders: of the runs that it serves, the first one's first.
        names: by which its models are asked.
        url: the address that a client is given.
        pid, started: its process, and when that started, seconds since 1970: a number that was given anew is another process.
        host: the machine.
    """

    folders: tuple[str, ...]
    names: tuple[str, ...]
    url: str
    pid: int
    started: float
    host: str


def token_path(pid: int) -> Path:
    """Returns the file that holds the token of a process's server."""
    return private_folder(FOLDER) / f"{socket.gethostname()}-{pid}.token"


def log_path(pid: int) -> Path:
    """Returns the file that a server writes its warnings and failures to while it runs; no other user can read it."""
    return private_folder(FOLDER) / f"{socket.gethostname()}-{pid}.log"


@contextlib.contextmanager
def recorded(serving: Serving, token: str) -> Iterator[None]:
    """Keeps the record of a server and its token while it runs."""
    paths = [_path(serving.pid), token_path(serving.pid)]
    try:
        for path, text in zip(paths, (json.dumps(asdict(serving)), token), strict=True):
            path.unlink(missing_ok=True)  # of an earlier process of this number
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
        yield
    finally:
        for path in (*paths, log_path(serving.pid)):
            path.unlink(missing_ok=True)


def all_serving() -> list[Serving]:
    """Returns this account's servers on this machine."""
    found = []
    for path in sorted(private_folder(FOLDER).glob(f"{socket.gethostname()}-*.json")):
        with contextlib.suppress(RunError):
            serving = read_record(path, Serving)
            if is_alive(serving):
                found.append(serving)
                continue
        for left in (path, path.with_suffix(".token"), path.with_suffix(".log")):
            left.unlink(missing_ok=True)
    return found


def is_alive(serving: Serving) -> bool:
    """Whether its process runs, and is not another one with the same number."""
    import psutil

    try:
        return abs(psutil.Process(serving.pid).create_time() - serving.started) < 1.0
    except psutil.Error:
        return False


def _path(pid: int) -> Path:
    return private_folder(FOLDER) / f"{socket.gethostname()}-{pid}.json"
