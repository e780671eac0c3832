"""The teacher's receiver: takes learners' lines over the room's network, says what is open, and has a page with buttons.

Nothing that arrives is run or stored as it came: lines are read, those of known exercises are written anew under the sender's own
seat, and sizes, seats and connections are limited. The teacher's page answers this machine alone, under a key of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.server
import ipaddress
import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import write_text
from qlora_helpers.teaching.board import MOST_SEATS, seat_name
from qlora_helpers.teaching.collecting import read_content
from qlora_helpers.teaching.measured import KIND
from qlora_helpers.teaching.releases import teacher_release
from qlora_helpers.teaching.sending import KEY_HEADER, MOST_BYTES, SEAT_HEADER, file_name

MOST_CONNECTIONS = 32
MOST_FORM_BYTES = 4096
REQUEST_S = 10.0


@dataclass(frozen=True)
class TeacherPage:
    """The board with buttons.

    Attributes:
        key: is part of the page's address; a request without it gets no page.
        make: returns the page, whose forms post to the address that it is given.
        press: called with the fields of a button's form.
    """

    key: str
    make: Callable[[str], str]
    press: Callable[[Mapping[str, str]], None]

    @property
    def path(self) -> str:
        """The path of the page on the receiver."""
        return f"/teacher/{self.key}"


class Receiver(http.server.ThreadingHTTPServer):
    """Takes learners' lines over HTTP and writes a file for each seat.

    Args:
        address: host and port to listen on; port 0 takes a free one.
        folder: gets the seats' files; it is made where it is missing.
        token: what the class knows; requests without it are refused.
        page: the teacher's page; None has none.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], folder: Path, token: str, page: TeacherPage | None = None) -> None:
        self.folder, self.token, self.page = folder, token, page
        folder.mkdir(parents=True, exist_ok=True)
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.writing = threading.Lock()
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
        found = read_content(content)
        lines = [asdict(replace(each, seat=seat)) for each in found.attempts]
        lines += [{"kind": KIND} | asdict(replace(each, seat=seat)) for each in found.runs]
        path = self.folder / file_name(seat)
        owner, mark = path.with_suffix(".owner"), hashlib.sha256(key.encode()).hexdigest()
        with self.writing:
            if owner.exists():
                if not hmac.compare_digest(owner.read_text(encoding="utf-8").strip(), mark):
                    return 409
            elif sum(1 for _ in self.folder.glob("*.owner")) >= MOST_SEATS:
                return 507
            else:
                write_text(owner, mark + "\n")
            write_text(path, "".join(json.dumps(each) + "\n" for each in lines))
        return 204


def _shut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver
    server_version, sys_version = "qlora-board", ""
    timeout = 5

    def do_GET(self) -> None:
        page = self._teacher_page()
        if page is not None and self.path == page.path:
            self._answer(200, page.make(f"{page.path}/press").encode(), "text/html; charset=utf-8")
        elif not self._has_token():
            self._answer(401)
        elif self.path == "/release":
            opened = asdict(teacher_release(self.server.folder))
            self._answer(200, json.dumps(opened).encode(), "application/json")
        else:
            self._answer(404)

    def do_POST(self) -> None:
        page = self._teacher_page()
        if page is not None and self.path == f"{page.path}/press":
            status = self._length_status(MOST_FORM_BYTES)
            if not status:
                status = self._pressed(page)
            self._answer(status, location=page.path if status == 303 else "")
        else:
            self._answer(self._status())

    def _pressed(self, page: TeacherPage) -> int:
        try:
            fields = parse_qs(self._content().decode("utf-8", "replace"), max_num_fields=8)
            with self.server.writing:
                page.press({name: values[0] for name, values in fields.items()})
        except ValueError:
            return 400
        except UserError:
            return 500
        return 303

    def _teacher_page(self) -> TeacherPage | None:
        """The teacher's page, where this machine asks with the key."""
        page = self.server.page
        if page is None or not ipaddress.ip_address(self.client_address[0]).is_loopback:
            return None
        given = self.path.split("/")[2] if self.path.startswith("/teacher/") else ""
        return page if hmac.compare_digest(given.encode("utf-8", "replace"), page.key.encode()) else None

    def _has_token(self) -> bool:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return kind == "Bearer" and hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode())

    def _length_status(self, most: int) -> int:
        """What is wrong with the length of a request's content, as an HTTP status; 0 if nothing is."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal() and len(length) <= 9):
            return 411
        return 413 if int(length) > most else 0

    def _content(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _status(self) -> int:
        if not self._has_token():
            return 401
        if self.path != "/attempts":
            return 404
        if status := self._length_status(MOST_BYTES):
            return status
        seat, key = seat_name(self.headers.get(SEAT_HEADER, "")), self.headers.get(KEY_HEADER, "")
        if not (len(key) == 32 and key.isascii() and key.isalnum()):
            return 400
        content = self._content()
        return self.server.take(seat, key, content) if len(content) == int(self.headers["Content-Length"]) else 400

    def _answer(self, status: int, content: bytes = b"", kind: str = "", location: str = "") -> None:
        self.close_connection = True
        self.send_response(status)
        headers = {"Content-Type": kind, "Location": location, "Content-Length": str(len(content))}
        headers |= {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "Connection": "close"}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps no log: addresses of learners are nobody's business."""
