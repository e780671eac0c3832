"""Brings a learner's attempts to the teacher's board, where `QLORA_BOARD` names one; a lesson never waits for it.

`QLORA_BOARD` is a common folder, `s3://BUCKET/PREFIX`, or the address that `qlora board --serve` prints. What is sent is the end
of `attempts.jsonl`, so the file itself is the queue: whatever the teacher missed arrives with the next line that does. Standard
library alone, but for S3.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from qlora_helpers.base.addresses import redacted
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import write_text
from qlora_helpers.teaching import attempts

MOST_BYTES = 256 * 1024  # that are sent and taken; a lesson makes some kilobytes
TIMEOUT_S = 5
RETRY_S, MOST_RETRIES = 20, 30  # ten minutes, while the kernel lives
SEAT_HEADER, KEY_HEADER = "X-Qlora-Seat", "X-Qlora-Seat-Key"
_state = threading.Condition()
_sender: threading.Thread | None = None
_news = 0


class NotDelivered(Exception):
    """The board was not reached (`again` is True) or refuses the lines."""

    def __init__(self, text: str, *, again: bool) -> None:
        super().__init__(text)
        self.again = again


def address() -> str:
    """Returns `$QLORA_BOARD`, empty where there is no board."""
    return os.environ.get("QLORA_BOARD", "").strip()


def file_name(seat: str) -> str:
    """Returns the name of a seat's file on the teacher's side: no character of the seat is in it."""
    return f"seat-{hashlib.sha256(seat.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.jsonl"


def send_soon() -> None:
    """Sends the learner's lines in a thread, again and again for ten minutes where the board is away; returns at once."""
    global _sender, _news
    if not address():
        return
    with _state:
        _news += 1
        _state.notify_all()
        if _sender is None or not _sender.is_alive():
            _sender = threading.Thread(target=_send_until_delivered, name="qlora-board", daemon=True)
            _sender.start()


def _send_until_delivered() -> None:
    global _sender
    retries = 0
    while True:
        with _state:
            seen = _news
        again = False
        try:
            send()
        except NotDelivered as error:
            again = error.again
        except Exception:  # whatever happens to a line for the board, the learner's work goes on
            pass
        retries = retries + 1 if again else 0
        with _state:
            if again and retries < MOST_RETRIES:
                _state.wait_for(lambda: _news != seen, timeout=RETRY_S)  # noqa: B023 - called before the next turn
            elif _news == seen:
                _sender = None  # within the lock: whoever has news from here on starts another thread
                return


def send() -> str:
    """Sends the learner's lines now, and returns where they went.

    Raises:
        NotDelivered: the board can't be reached, or does not take them.
        UserError: `QLORA_BOARD` is not an address.
    """
    board, seat, content = address(), attempts.seat(), _content()
    if not content:
        return "there is nothing to send yet"
    if board.startswith(("http://", "https://")):
        _post(board, seat, content)
    elif board.startswith("s3://"):
        _put(board, seat, content)
    elif board:
        try:
            write_text(Path(board).expanduser() / file_name(seat), content.decode("utf-8", "replace"))
        except UserError as error:
            raise NotDelivered(str(error), again=True) from error
    else:
        raise UserError("there is no board", next_step="Set QLORA_BOARD to the address that the teacher gives.")
    return redacted(board)


def _content() -> bytes:
    """The end of the learner's file, from a whole line on."""
    try:
        with open(attempts.learner_folder() / attempts.FILE, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MOST_BYTES))
            content = file.read(MOST_BYTES)
    except OSError:
        return b""
    return content if size <= MOST_BYTES else content.partition(b"\n")[2]


def _post(board: str, seat: str, content: bytes) -> None:
    headers = {
        "Content-Type": "application/jsonl",
        SEAT_HEADER: "".join(char for char in seat if char.isascii() and char.isprintable()) or "?",
        KEY_HEADER: _seat_key(),
    }
    try:
        asked(board, "/attempts", content, headers)
    except urllib.error.HTTPError as error:
        reason = {401: "the token is wrong", 409: "another learner has this seat: set QLORA_SEAT to your own"}
        raise NotDelivered(reason.get(error.code, f"it answered {error.code}"), again=error.code >= 500) from None
    except (OSError, ValueError) as error:
        raise NotDelivered(f"the board does not answer ({type(error).__name__})", again=True) from None


def asked(
    board: str, path: str, content: bytes | None = None, headers: Mapping[str, str] | None = None, *, most: int = 1024
) -> bytes:
    """Sends a request to a board's receiver and returns its answer.

    Args:
        board: `http://TOKEN@HOST:PORT`.
        path: of the request.
        content: what is posted; None gets.
        headers: beside the token's.
        most: bytes of the answer that are read.

    Raises:
        UserError: the board is not an address.
        OSError, ValueError: nobody answers there, or it refuses.
    """
    try:
        parts = urlsplit(board)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        url = f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "") + path
    except ValueError:
        raise UserError("QLORA_BOARD is not an address", expected="http://TOKEN@HOST:PORT") from None
    every = {"Authorization": f"Bearer {parts.username or ''}"} | dict(headers or {})
    request = urllib.request.Request(url, content, every, method="GET" if content is None else "POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a room's own network needs no proxy
    with opener.open(request, timeout=TIMEOUT_S) as answer:
        found: bytes = answer.read(most)
        return found


def _seat_key() -> str:
    """A secret of this learner: whoever takes a seat on a board first keeps it."""
    path = attempts.learner_folder() / "board_key"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if len(found := path.read_text(encoding="utf-8").strip()) == 32 and found.isalnum():
            return found
    key = secrets.token_hex(16)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(key + "\n")
    return key


def _put(board: str, seat: str, content: bytes) -> None:
    from qlora_helpers.teaching.collecting import s3_client, s3_place

    bucket, prefix = s3_place(board)
    try:
        s3_client().put_object(Bucket=bucket, Key=prefix + file_name(seat), Body=content)
    except Exception as error:  # botocore's errors have no common class that is importable without it
        raise NotDelivered(f"the bucket did not take them ({type(error).__name__})", again=True) from None
