"""The errors that a person can fix.

Every step raises `UserError` or a subclass for what its caller can put right: the message says what was expected, what was found
and what to do next. The command line prints it and exits with code 2; any other exception is a bug in this package.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_helpers.base.addresses import redacted
from qlora_helpers.base.text import plain

RED, PLAIN = "\x1b[0;31m", "\x1b[0m"


def _clean(text: str) -> str:
    return plain(redacted(text))


class UserError(Exception):
    """Something that the user can fix. Its message holds no credentials and no terminal codes, whatever it quotes.

    Args:
        problem: what is wrong, in one sentence without a full stop.
        expected: what would have been right (optional).
        got: what was found instead (optional).
        next_step: what to do about it, in a whole sentence (optional).
    """

    def __init__(self, problem: str, *, expected: str = "", got: str = "", next_step: str = "") -> None:
        problem, expected, got, next_step = map(_clean, (problem, expected, got, next_step))
        self.problem, self.expected, self.got, self.next_step = problem, expected, got, next_step
        parts = [problem.rstrip(".")]
        parts += [f"expected {expected}"] if expected else []
        parts += [f"got {got}"] if got else []
        super().__init__("; ".join(parts) + "." + (f" {next_step}" if next_step else ""))

    def _render_traceback_(self) -> list[str]:
        """Returns what IPython shows below a cell in place of a traceback: the message alone, for the traceback helps nobody."""
        return [f"{RED}{type(self).__name__}{PLAIN}: {self}"]


class Interrupted(KeyboardInterrupt):
    """A person interrupted a cell or a command, which left everything in order; IPython shows it as one line."""

    def _render_traceback_(self) -> list[str]:
        return [f"stopped: {self}"]


class ConfigError(UserError):
    """Settings are unknown or wrong; `problems` lists all of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(map(_clean, problems))
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        count = "1 setting is" if len(self.problems) == 1 else f"{len(self.problems)} settings are"
        Exception.__init__(self, f"{count} unknown or wrong; nothing was changed:{lines}")


class DataError(UserError):
    """A data source can't be read or used; the message names the file and, if there is one, the line."""


class RunError(UserError):
    """A run's folder is not in the state that a step needs."""


class ModelError(UserError):
    """A model can't be loaded, or is not the one that was asked for."""
