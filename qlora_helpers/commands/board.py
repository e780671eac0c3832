"""`qlora board`: shows a class's attempts as a table and a page, receives them over the room's network, or sends one's own."""

from __future__ import annotations

import argparse
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import UserError

PORT = 8765


def add_commands(commands: Any) -> None:
    """Adds the command to the parser's own."""
    command = commands.add_parser(
        "board",
        help="a teacher's board: which seat has done which exercise, and who is stuck",
        epilog="Learners set QLORA_BOARD to the folder, to s3://BUCKET/PREFIX, or to the address that --serve prints; "
        "QLORA_SEAT names a seat. A line holds seat, exercise, outcome, misconception, tries, minutes and time: no code "
        "and no answer.",
    )
    command.add_argument("source", nargs="?", help="the folder or s3://BUCKET/PREFIX that the lines are in")
    command.add_argument(
        "--page", metavar="FILE", help="also write a page that a browser loads again every ten seconds"
    )
    command.add_argument(
        "--exercises", metavar="A,B,...", help="the lesson's exercises in order (default: those touched)"
    )
    command.add_argument("--watch", action="store_true", help="write the page and print the table again until Ctrl+C")
    command.add_argument(
        "--serve",
        nargs="?",
        const=f"0.0.0.0:{PORT}",
        metavar="HOST:PORT",
        help=f"receive lines over HTTP into the folder (default: every address of this machine, port {PORT})",
    )
    command.add_argument("--token", help="what learners have to know (default: drawn)")
    command.add_argument("--send", action="store_true", help="send one's own lines to QLORA_BOARD now")


def run_board(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if options.send:
        return _send()
    if options.source is None:
        raise UserError("no folder is named", next_step="qlora board FOLDER, or qlora board --serve -- FOLDER.")
    names = _chosen(options.exercises)
    if options.serve is None:
        return _show(options, names)
    if options.source.startswith("s3://"):
        raise UserError("lines are received into a folder of this machine", got=options.source)
    return _serve(options, names)


def _chosen(text: str | None) -> list[str] | None:
    from qlora_helpers.teaching.exercises import all_exercises

    names = [name.strip() for name in text.split(",") if name.strip()] if text else None
    unknown = [name for name in names or () if name not in all_exercises()]
    if unknown:
        raise UserError(
            f"there is no exercise {unknown[0]!r}",
            expected=", ".join(all_exercises()),
            next_step="Name them as in workshop/labs.",
        )
    return names


def _show(options: argparse.Namespace, names: list[str] | None) -> int:
    from qlora_helpers.base.files import write_text
    from qlora_helpers.teaching.board import REFRESH_S, make_board
    from qlora_helpers.teaching.collecting import collect

    while True:
        board = make_board(collect(options.source), exercises=names)
        if options.page:
            write_text(Path(options.page), board.page())
        print(board, flush=True)
        if not options.watch:
            return 0
        time.sleep(REFRESH_S)


def _serve(options: argparse.Namespace, names: list[str] | None) -> int:
    from qlora_helpers.teaching.collecting import Receiver

    host, _, port = options.serve.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UserError("--serve takes an address", expected=f"HOST:PORT, such as 0.0.0.0:{PORT}", got=options.serve)
    token = options.token or secrets.token_hex(4)
    if not (token.isascii() and token.isalnum()):
        raise UserError("the token stands in an address", expected="letters and digits", got=repr(token))
    try:
        receiver = Receiver((host or "0.0.0.0", int(port)), Path(options.source).expanduser(), token)
    except OSError as error:
        raise UserError(
            f"{options.serve} can't be listened on ({error.strerror})", next_step="Take another port."
        ) from error
    options.page, options.watch = options.page or str(Path(options.source) / "board.html"), True
    shown = _own_address() if host in ("", "0.0.0.0") else host
    print("Learners run this before they start JupyterLab, or put it into a cell:")
    print(f"  export QLORA_BOARD=http://{token}@{shown}:{receiver.server_port}")
    print(f"The board: {options.page}", flush=True)
    with receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        try:
            return _show(options, names)
        finally:
            receiver.shutdown()


def _own_address() -> str:
    """This machine's address in the room's network; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737): only the route is looked up
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _send() -> int:
    from qlora_helpers.teaching import sending

    try:
        print(f"Sent: {sending.send()}")
    except sending.NotDelivered as error:
        raise UserError(
            f"not delivered: {error}", next_step="Your lines are kept and go with the next that arrives."
        ) from error
    return 0


COMMANDS = {"board": run_board}
