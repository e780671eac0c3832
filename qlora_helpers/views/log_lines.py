"""The lines of a run's log, parsed: when, how serious, and whether they hold the values of a step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
