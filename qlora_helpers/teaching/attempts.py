"""What a learner has tried: one line for each checked exercise, in the learner's own folder, without code and without names.

The lines are what the workshop's board collects. They also decide when a solution opens, so that a restarted kernel forgets
nothing. Standard library alone.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE, SEAT = "attempts.jsonl", "seat"
MOST_BYTES = 4 * 1024**2  # of the file that is read; a course makes a few kilobytes


@dataclass(frozen=True)
class Attempt:
    """One look at an exercise.

    Attributes:
        seat: who it was, by a name that says nothing about the person.
        exercise: the exercise's name.
        outcome: `not tried`, `wrong`, `right`, `hint` or `solution`.
        misconception: the code of a wrong answer that was recognised, else empty.
        tries: how many wrong or right answers there were by then.
        minutes: since the learner first touched the exercise.
        time: seconds since 1970.
    """

    seat: str
    exercise: str
    outcome: str
    misconception: str
    tries: int
    minutes: float
    time: float


def learner_folder() -> Path:
    """Returns `$QLORA_LEARNER`, else `$XDG_DATA_HOME/qlora_helpers/learner` (`~/.local/share/...`); it need not exist yet."""
    if os.environ.get("QLORA_LEARNER"):
        return Path(os.environ["QLORA_LEARNER"]).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "qlora_helpers" / "learner"


def seat() -> str:
    """Returns `$QLORA_SEAT`, such as `7`, else six letters and digits that were drawn when they were first asked for."""
    named = os.environ.get("QLORA_SEAT", "").strip()
    if named:
        return named[:20]
    path = learner_folder() / SEAT
    try:
        found = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        found = ""
    if not (found.isalnum() and len(found) <= 20):
        found = secrets.token_hex(3)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(found + "\n", encoding="utf-8")
    return found


def attempts(exercise: str | None = None, folder: Path | None = None) -> list[Attempt]:
    """Reads the learner's attempts, oldest first; lines that are not whole, or of another kind, are passed over.

    Args:
        exercise: of this one alone; None reads all.
        folder: the learner's; None takes `learner_folder()`.
    """
    try:
        with open((folder or learner_folder()) / FILE, "rb") as file:
            found = read_lines(file.read(MOST_BYTES))
    except OSError:
        return []
    return [attempt for attempt in found if exercise in (None, attempt.exercise)]


def read_lines(content: bytes) -> list[Attempt]:
    """Returns the attempts in a file's content; lines that are not whole, or of another kind, are passed over."""
    return [attempt for line in content.splitlines() if (attempt := _read(line)) is not None]


def _read(line: bytes) -> Attempt | None:
    try:
        value = json.loads(line)
        return Attempt(
            str(value["seat"])[:20],
            str(value["exercise"])[:40],
            str(value["outcome"])[:20],
            str(value["misconception"])[:40],
            int(value["tries"]),
            float(value["minutes"]),
            float(value["time"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def record(exercise: str, outcome: str, misconception: str = "") -> Attempt:
    """Adds one line for an exercise, and returns it. A folder that can't be written costs the line and nothing else."""
    earlier, now = attempts(exercise), time.time()
    tries = sum(each.outcome in ("wrong", "right") for each in earlier) + (outcome in ("wrong", "right"))
    minutes = round((now - earlier[0].time) / 60, 1) if earlier else 0.0
    made = Attempt(seat(), exercise, outcome, misconception, tries, minutes, round(now, 1))
    append(asdict(made))
    return made


def append(line: dict[str, Any]) -> bool:
    """Adds a line to the learner's file, and returns whether it could be written."""
    try:
        folder = learner_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # One write of less than a page to a file that is appended to: two kernels never mix their lines
        handle = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            os.write(handle, json.dumps(line).encode() + b"\n")
        finally:
            os.close(handle)
    except OSError:
        return False
    return True
