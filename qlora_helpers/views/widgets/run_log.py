"""The log of a run as a panel shows it: lines with short times and levels, without those that the table of steps shows better."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SHOWN = {"without steps": 20, "warnings and errors": 30, "everything": 0}
"""What can be chosen, and the level from which lines are shown."""
LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
_LOGGED = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d),\d{3} (\S+) (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)")
_STEP = re.compile(r"step \d+: (?:epoch|loss|eval_loss) ")


@dataclass(frozen=True)
class Entry:
    """One line of a log.

    Attributes:
        text: what it says.
        level: a name out of `LEVELS`; a line without one of its own, such as one of a traceback, has that of the line before.
        time, date: `HH:MM:SS` and `YYYY-MM-DD` of the trainer's machine; empty where the line has none.
        logger: who wrote it.
    """

    text: str
    level: str = "INFO"
    time: str = ""
    date: str = ""
    logger: str = ""

    @property
    def is_step(self) -> bool:
        """Whether it holds the values of a logged step."""
        return bool(_STEP.match(self.text))


def entries(lines: Sequence[str]) -> Iterator[Entry]:
    """Parses the lines of a log."""
    level = "INFO"
    for line in lines:
        found = _LOGGED.fullmatch(line)
        if found:
            date, time, logger, level, text = found.groups()
            yield Entry(text, level, time, date, logger)
        elif line.startswith(("error: ", "Traceback ")):
            level = "ERROR"
            yield Entry(line, level)
        else:
            yield Entry(line, level)


def log_html(lines: Sequence[str], shown: str = "without steps") -> str:
    """Returns the lines as HTML, the newest last; empty without lines.

    Args:
        lines: the last lines of the log.
        shown: a key of `SHOWN`.
    """
    if not lines:
        return ""
    least = SHOWN[shown]
    kept = [entry for entry in entries(lines) if LEVELS[entry.level] >= least and (not least or not entry.is_step)]
    rows = "".join(map(_row, kept)) or '<div class="muted">no such line among the last ones</div>'
    return f'<div class="qlora-tail" tabindex="0" role="region" aria-label="log of the run"><div>{rows}</div></div>'


def _row(entry: Entry) -> str:
    name = "" if entry.level == "INFO" else f"<b>{entry.level.lower()}</b> "
    when = f'<time title="{html.escape(f"{entry.date} {entry.logger}")}">{entry.time}</time> ' if entry.time else ""
    return f'<div class="{entry.level.lower()}">{when}{name}{html.escape(entry.text)}</div>'
