"""What the teacher has opened: the solutions of exercises, and which exercises are shown as today's.

The teacher's side writes `release.json` beside the learners' lines, in the folder or the bucket of the board; a learner reads it
there, or asks the receiver for it. Where the board is away, what was read last counts. Standard library alone, but for S3.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import write_text
from qlora_helpers.base.folders import open_regular
from qlora_helpers.teaching import attempts, sending

FILE, KEPT = "release.json", "released.json"
MOST_BYTES, MOST_NAMES = 16 * 1024, 200


@dataclass(frozen=True)
class Release:
    """What is open for everybody.

    Attributes:
        solutions: exercises whose solutions open without two wrong answers.
        shown: exercises that the class has come to, in order.
    """

    solutions: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()

    def with_solutions(self, names: Iterable[str]) -> Release:
        """Returns the release with further solutions opened."""
        return Release(tuple(dict.fromkeys([*self.solutions, *names])), self.shown)

    def with_shown(self, names: Iterable[str]) -> Release:
        """Returns the release with further exercises shown."""
        return Release(self.solutions, tuple(dict.fromkeys([*self.shown, *names])))


def next_shown(release: Release, groups: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Returns the first group of exercises, in a lesson's order, of which something is not shown yet; empty after the last."""
    return next((tuple(group) for group in groups if set(group) - set(release.shown)), ())


def read_release(content: bytes) -> Release:
    """Returns the release in a file's content; what is no release opens nothing."""
    try:
        value = json.loads(content)
        return Release(_names(value["solutions"]), _names(value["shown"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return Release()


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(str(name)[:40] for name in value[:MOST_NAMES])


def teacher_release(source: str | os.PathLike[str]) -> Release:
    """Returns what is open on a board, as the teacher sees it.

    Args:
        source: the board's folder, or `s3://BUCKET/PREFIX`.

    Raises:
        UserError: the bucket can't be read.
    """
    text = os.fspath(source)
    if not text.startswith("s3://"):
        return read_release(_from_folder(Path(text).expanduser()))
    try:
        return read_release(_from_bucket(text))
    except Exception as error:  # botocore's errors have no common class that is importable without it
        raise _refused(error) from error


def write_release(source: str | os.PathLike[str], release: Release) -> None:
    """Writes what is open on a board, in place of what was.

    Args:
        source: the board's folder, or `s3://BUCKET/PREFIX`.
        release: what is open from now on.

    Raises:
        UserError: it can't be written there.
    """
    text, content = os.fspath(source), json.dumps(asdict(release)) + "\n"
    if not text.startswith("s3://"):
        write_text(Path(text).expanduser() / FILE, content)
        return
    from qlora_helpers.teaching.collecting import s3_client, s3_place

    bucket, prefix = s3_place(text)
    try:
        s3_client().put_object(Bucket=bucket, Key=prefix + FILE, Body=content.encode())
    except Exception as error:
        raise _refused(error) from error


def _refused(error: Exception) -> UserError:
    problem = f"what the board's bucket has opened can't be read or written ({type(error).__name__})"
    return UserError(problem, next_step="Check the role.")


def released() -> Release:
    """Returns what the teacher has opened on the board that `QLORA_BOARD` names; nothing where there is no board.

    A board that is away is waited for some seconds, and then what was read from it last counts.
    """
    board = sending.address()
    if not board:
        return Release()
    kept, mark = attempts.learner_folder() / KEPT, hashlib.sha256(board.encode("utf-8", "replace")).hexdigest()
    try:
        found = _asked(board)
    except Exception:  # no board may cost a learner more than the news
        return _kept(kept, mark)
    with contextlib.suppress(UserError):
        write_text(kept, json.dumps(asdict(found) | {"board": mark}) + "\n")
    return found


def _asked(board: str) -> Release:
    if board.startswith(("http://", "https://")):
        return read_release(sending.asked(board, "/release", most=MOST_BYTES))
    if board.startswith("s3://"):
        return read_release(_from_bucket(board))
    return read_release(_from_folder(Path(board).expanduser()))


def _kept(path: Path, mark: str) -> Release:
    """What was read from the same board before."""
    try:
        content = path.read_bytes()[:MOST_BYTES]
        return read_release(content) if json.loads(content)["board"] == mark else Release()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Release()


def _from_folder(folder: Path) -> bytes:
    """The file's content, empty where there is none; a folder that is away raises."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        with open_regular(folder / FILE, follow=False) as file:
            return file.read(MOST_BYTES)
    except FileNotFoundError:
        return b""


def _from_bucket(board: str) -> bytes:
    from qlora_helpers.teaching.collecting import s3_client, s3_place

    bucket, prefix = s3_place(board)
    try:
        content: bytes = s3_client().get_object(Bucket=bucket, Key=prefix + FILE)["Body"].read(MOST_BYTES)
    except Exception as error:
        if getattr(error, "response", {}).get("Error", {}).get("Code") == "NoSuchKey":
            return b""  # nothing was opened yet
        raise
    return content
