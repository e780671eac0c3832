"""`qlora board`: shows a class's attempts and runs, receives them over the room's network, opens solutions, or sends one's own."""

from __future__ import annotations

import argparse
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qlora_helpers.teaching.board import Board

PORT = 8765


def add(commands: Any) -> None:
    """Adds the command to the parser's own.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    command = commands.add_parser(
        "board",
        help="a teacher's board: which seat has done which exercise, and who is stuck",
        epilog="Learners set QLORA_BOARD to the folder, to s3://BUCKET/PREFIX, or to the address that --serve prints; "
        "QLORA_SEAT names a seat. A line holds seat, exercise, outcome, misconception, tries, minutes and time: no code "
        "and no answer. A run's numbers go with them once its learner shares it.",
    )
    command.set_defaults(call=run_board)
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
    command.add_argument(
        "--release", metavar="A,B,...", help="open the solutions of exercises for everybody: names, all, or none"
    )
    command.add_argument(
        "--show",
        metavar="A,B,...",
        help="show exercises to the class: names, none, or next (those of the next notebook)",
    )
    command.add_argument("--send", action="store_true", help="a learner's: send one's own lines to QLORA_BOARD now")
    command.add_argument(
        "--predict",
        nargs=2,
        metavar=("RUN", "LOSS"),
        help="a learner's: commit a prediction of a run's lowest evaluation loss, before it is measured",
    )
    command.add_argument("--share", metavar="RUN", help="a learner's: share a trained run's numbers with the class")


def run_board(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if options.send or options.predict or options.share:
        return _learner(options)
    if options.source is None:
        raise UserError("no folder is named", next_step="qlora board FOLDER, or qlora board --serve -- FOLDER.")
    names = _chosen(options.exercises)
    if options.release or options.show:
        return _open(options, names)
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


def _open(options: argparse.Namespace, names: list[str] | None) -> int:
    """Opens solutions, shows exercises, and says what is open."""
    from dataclasses import replace

    from qlora_helpers.teaching.collecting import collect
    from qlora_helpers.teaching.exercises import all_exercises
    from qlora_helpers.teaching.releases import teacher_release, write_release

    collect(options.source)  # a folder that is mistyped is refused, and not made
    release = teacher_release(options.source)
    if options.release:
        every = list(names or all_exercises())
        given = {"all": every, "none": []}.get(options.release)
        given = _chosen(options.release) or [] if given is None else given
        release = release.with_solutions(given) if options.release != "none" else replace(release, solutions=())
    if options.show:
        fixed = {"next": _next(release.shown, names), "none": []}.get(options.show)
        shown = _chosen(options.show) or [] if fixed is None else fixed
        release = release.with_shown(shown) if options.show != "none" else replace(release, shown=())
    write_release(options.source, release)
    print(f"Solutions open for everybody: {', '.join(release.solutions) or 'none'}")
    print(f"Shown to the class: {', '.join(release.shown) or 'nothing yet'}")
    return 0


def _next(shown: Sequence[str], names: list[str] | None) -> Sequence[str]:
    from qlora_helpers.teaching.board import groups_of
    from qlora_helpers.teaching.releases import Release, next_shown

    return next_shown(Release(shown=tuple(shown)), groups_of(names))


def _pressed(source: str, names: list[str] | None, fields: Mapping[str, str]) -> None:
    """What a button of the teacher's page does."""
    from qlora_helpers.teaching.exercises import all_exercises
    from qlora_helpers.teaching.releases import teacher_release, write_release

    release = teacher_release(source)
    if fields.get("solution") in all_exercises():
        release = release.with_solutions([fields["solution"]])
    if fields.get("show") == "next":
        release = release.with_shown(_next(release.shown, names))
    write_release(source, release)


def _board(source: str, names: list[str] | None) -> Board:
    from qlora_helpers.teaching.board import make_board
    from qlora_helpers.teaching.collecting import collect
    from qlora_helpers.teaching.releases import teacher_release

    lines = collect(source)
    return make_board(lines.attempts, lines.runs, release=teacher_release(source), exercises=names)


def _show(options: argparse.Namespace, names: list[str] | None) -> int:
    from qlora_helpers.base.files import write_text
    from qlora_helpers.teaching.board import REFRESH_S

    while True:
        board = _board(options.source, names)
        if options.page:
            write_text(Path(options.page), board.page())
        print(board, flush=True)
        if not options.watch:
            return 0
        time.sleep(REFRESH_S)


def _serve(options: argparse.Namespace, names: list[str] | None) -> int:
    from qlora_helpers.teaching.receiving import Receiver, TeacherPage

    host, _, port = options.serve.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UserError("--serve takes an address", expected=f"HOST:PORT, such as 0.0.0.0:{PORT}", got=options.serve)
    token = options.token or secrets.token_hex(4)
    if not (token.isascii() and token.isalnum()):
        raise UserError("the token stands in an address", expected="letters and digits", got=repr(token))
    page = TeacherPage(
        secrets.token_hex(8),
        lambda action: _board(options.source, names).page(action=action),
        lambda fields: _pressed(options.source, names, fields),
    )
    try:
        receiver = Receiver((host or "0.0.0.0", int(port)), Path(options.source).expanduser(), token, page)
    except OSError as error:
        raise UserError(
            f"{options.serve} can't be listened on ({error.strerror})", next_step="Take another port."
        ) from error
    options.page, options.watch = options.page or str(Path(options.source) / "board.html"), True
    shown = _own_address() if host in ("", "0.0.0.0") else host
    print("Learners run this before they start JupyterLab, or put it into a cell:")
    print(f"  export QLORA_BOARD=http://{token}@{shown}:{receiver.server_port}")
    print(f"The board: {options.page}")
    if host in ("", "0.0.0.0", "127.0.0.1", "localhost"):
        print("The board with buttons, on this machine alone:")
        print(f"  http://127.0.0.1:{receiver.server_port}{page.path}", flush=True)
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


def _learner(options: argparse.Namespace) -> int:
    """A learner's own commands: commit a prediction, share a run, send what is kept."""
    from qlora_helpers.teaching import measured, sending

    if options.predict:
        name, text = options.predict
        try:
            loss = float(text)
        except ValueError:
            raise UserError("--predict takes a run and a loss", expected="RUN 2.4", got=text) from None
        print(measured.predict(name, loss))
    if options.share:
        found = measured.share(options.share)
        print(f"Rank {found.rank}, learning rate {found.learning_rate:g}, seed {found.seed}: loss {found.loss:.4f}")
        if found.predicted is None:
            print("No prediction was committed before it was measured.")
        else:
            print(f"Predicted: {found.predicted:g}")
    if not (options.send or (options.share and sending.address())):
        return 0
    try:
        print(f"Sent: {sending.send()}")
    except sending.NotDelivered as error:
        raise UserError(
            f"not delivered: {error}", next_step="Your lines are kept and go with the next that arrives."
        ) from error
    return 0
