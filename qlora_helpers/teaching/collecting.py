"""The teacher's side of a board: reads learners' lines from a folder or a bucket, and receives them over the room's network.

Nothing that arrives is run or stored as it came: lines are read, those of known exercises are written anew under the sender's own
seat, and sizes, seats and connections are limited.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.server
import json
import math
import os
import socket
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import write_text
from qlora_helpers.base.folders import open_regular
from qlora_helpers.teaching.attempts import Attempt, read_lines
from qlora_helpers.teaching.board import MOST_SEATS, OUTCOMES, seat_name
from qlora_helpers.teaching.exercises import all_exercises
from qlora_helpers.teaching.sending import KEY_HEADER, MOST_BYTES, SEAT_HEADER, file_name

MOST_CONNECTIONS = 32
REQUEST_S = 10.0


def collect(source: str | os.PathLike[str]) -> list[Attempt]:
    """Reads all learners' lines below a folder or an S3 prefix; what is no line of an attempt is left out.

    Args:
        source: a folder of `*.jsonl` files, or `s3://BUCKET/PREFIX`.

    Raises:
        UserError: there is no such folder, or the bucket can't be read.
    """
    text = os.fspath(source)
    contents = _from_bucket(text) if text.startswith("s3://") else _from_folder(Path(text).expanduser())
    return [each for content in contents for each in clean(read_lines(content))]


def clean(lines: list[Attempt]) -> list[Attempt]:
    """Returns the lines that name an exercise and an outcome that exist, with finite numbers and known misconceptions alone."""
    known = all_exercises()
    return [
        replace(
            each,
            seat=seat_name(each.seat),
            misconception=each.misconception if each.misconception in known[each.exercise].misconceptions else "",
        )
        for each in lines
        if each.exercise in known
        and each.outcome in OUTCOMES
        and math.isfinite(each.time)
        and math.isfinite(each.minutes)
        and abs(each.tries) < 10**6
    ]


def _from_folder(folder: Path) -> list[bytes]:
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder.name}", next_step="Make it, and let QLORA_BOARD of all learners name it."
        )
    found = []
    for path in sorted(folder.glob("*.jsonl"))[:MOST_SEATS]:
        try:
            with open_regular(path, follow=False) as file:
                found.append(file.read(MOST_BYTES))
        except OSError:
            continue  # a link, a pipe, or a file that another may not read
    return found


def s3_place(address: str) -> tuple[str, str]:
    """Returns bucket and prefix, which is empty or ends in a slash, of `s3://BUCKET/PREFIX`."""
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError("the board's address names no bucket", expected="s3://BUCKET/PREFIX", got=address)
    return bucket, prefix.strip("/") + "/" if prefix.strip("/") else ""


def s3_client() -> Any:
    """Makes an S3 client from the usual AWS settings, with short limits."""
    import boto3
    from botocore.config import Config

    settings = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 1})
    return boto3.session.Session().client("s3", config=settings)


def _from_bucket(address: str, client: Any = None) -> list[bytes]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = s3_place(address)
    try:
        client = client or s3_client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [each["Key"] for page in pages for each in page.get("Contents", ()) if each["Key"].endswith(".jsonl")]
        reads = (client.get_object(Bucket=bucket, Key=key)["Body"] for key in keys[:MOST_SEATS])
        return [body.read(MOST_BYTES) for body in reads]
    except (BotoCoreError, ClientError) as error:
        raise UserError(
            f"the board's bucket can't be read ({type(error).__name__})", next_step="Check the role."
        ) from error


class Receiver(http.server.ThreadingHTTPServer):
    """Takes learners' lines over HTTP and writes a file for each seat.

    Args:
        address: host and port to listen on; port 0 takes a free one.
        folder: gets the seats' files; it is made where it is missing.
        token: what the class knows; requests without it are refused.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], folder: Path, token: str) -> None:
        self.folder, self.token = folder, token
        folder.mkdir(parents=True, exist_ok=True)
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._writing = threading.Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serves a connection in a thread of its own, or closes it where there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Ends a connection after some seconds, however slowly it sends."""
        limit = threading.Timer(REQUEST_S, _shut, [request])
        limit.daemon = True
        limit.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            limit.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of connections that break."""

    def take(self, seat: str, key: str, content: bytes) -> int:
        """Writes the lines of a seat in place of those that it sent before, and returns an HTTP status."""
        lines = [replace(each, seat=seat) for each in clean(read_lines(content))]
        path = self.folder / file_name(seat)
        owner, mark = path.with_suffix(".owner"), hashlib.sha256(key.encode()).hexdigest()
        with self._writing:
            if owner.exists():
                if not hmac.compare_digest(owner.read_text(encoding="utf-8").strip(), mark):
                    return 409
            elif sum(1 for _ in self.folder.glob("*.owner")) >= MOST_SEATS:
                return 507
            else:
                write_text(owner, mark + "\n")
            write_text(path, "".join(json.dumps(asdict(each)) + "\n" for each in lines))
        return 204


def _shut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver
    server_version, sys_version = "qlora-board", ""
    timeout = 5

    def do_POST(self) -> None:
        self._answer(self._status())

    def _status(self) -> int:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind != "Bearer" or not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            return 401
        length = self.headers.get("Content-Length", "")
        if self.path != "/attempts":
            return 404
        if not (length.isascii() and length.isdecimal() and len(length) <= 9):
            return 411
        if int(length) > MOST_BYTES:
            return 413
        seat, key = seat_name(self.headers.get(SEAT_HEADER, "")), self.headers.get(KEY_HEADER, "")
        if not (len(key) == 32 and key.isascii() and key.isalnum()):
            return 400
        content = self.rfile.read(int(length))
        return self.server.take(seat, key, content) if len(content) == int(length) else 400

    def _answer(self, status: int) -> None:
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps no log: addresses of learners are nobody's business."""
