"""An exercise: a question, a check that names the misconception behind a wrong answer, hints, and a solution that opens late.

Owns how an answer is judged and shown. What is right is computed by each exercise's `judge` when it checks, from live objects or
from inputs that it draws; no notebook holds an expected value. Knows nothing of notebooks, and of the
board only which solutions it has opened.
"""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from types import FunctionType
from typing import Any

from qlora_helpers.base.style import inline
from qlora_helpers.teaching.attempts import attempts, record
from qlora_helpers.teaching.releases import released
from qlora_helpers.teaching.sending import send_soon

KINDS = ("write", "predict and measure", "break and fix", "judge")
TRIES = 2
"""Wrong answers after which the solution opens. `QLORA_TEACHER=1` opens it at once."""


class NotTried(Exception):
    """The answer is still the dots, or the `None`, of the notebook."""


class Wrong(Exception):
    """The answer is wrong.

    Args:
        misconception: a code of the exercise's `misconceptions`, or empty for a mistake that none of them explains.
        facts: what the misconception's message is filled with.
        message: what to say where the mistake has no code.
    """

    def __init__(self, misconception: str = "", message: str = "", **facts: object) -> None:
        super().__init__(message)
        self.misconception, self.message, self.facts = misconception, message, facts


@dataclass(frozen=True)
class Outcome:
    """What a check found: `not tried`, `wrong` or `right`, and one or two sentences about it."""

    verdict: str
    message: str
    misconception: str = ""
    exercise: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the answer was right."""
        return self.verdict == "right"

    def __repr__(self) -> str:
        return f"{self.verdict.upper()}: {self.message}"

    def _repr_html_(self) -> str:
        badge = {"right": "ok", "wrong": "failure"}.get(self.verdict, "warning")
        style = f'style="{inline("note")}"'
        return f'<p {style}><span style="{inline("badge", badge)}">{self.verdict}</span> {escape(self.message)}</p>'


@dataclass(frozen=True)
class Shown:
    """A hint or a solution, as text."""

    title: str
    text: str
    code: bool = False

    def __repr__(self) -> str:
        return f"{self.title}\n{textwrap.indent(self.text, '    ')}" if self.code else f"{self.title} {self.text}"

    def _repr_html_(self) -> str:
        body = f"<pre>{escape(self.text)}</pre>" if self.code else escape(self.text)
        return f'<p style="{inline("note")}"><b>{escape(self.title)}</b> {"" if self.code else body}</p>' + (
            body if self.code else ""
        )


@dataclass(frozen=True)
class Exercise:
    """A question and everything around it.

    Attributes:
        name: in attempts, on the board and in `teaching.exercises`.
        title: in a few words.
        kind: one of `KINDS`.
        minutes: how long it may take.
        question: one to three sentences.
        judge: takes the answer and returns, in a sentence, why it is right; raises `Wrong` or `NotTried`.
        misconceptions: code -> the sentence that names it; `{names}` in it come from `Wrong`'s facts.
        hints: from a nudge to nearly the answer.
        solution_is: a function whose source is shown, or a text.
        cell: where the solution is a text that is not code itself, what a solved notebook has in place of the dots, or where
            its cell has no dots, after the cell's assignments.
    """

    name: str
    title: str
    kind: str
    minutes: int
    question: str
    judge: Callable[..., str]
    misconceptions: Mapping[str, str]
    hints: tuple[str, ...]
    solution_is: Callable[..., Any] | str = field(repr=False)
    cell: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"{self.name}: {self.kind!r} is none of {KINDS}"

    def check(self, *answer: Any, **context: Any) -> Outcome:
        """Judges an answer, and keeps one line about it in the learner's folder.

        Args:
            answer: a value or a function, as the question asks; the notebook's `...` or `None` counts as not tried.
            context: live objects that the exercise needs, such as `model=`.
        """
        outcome = self._judged(answer, context)
        record(self.name, outcome.verdict, outcome.misconception)
        send_soon()
        return outcome

    def _judged(self, answer: tuple[Any, ...], context: Mapping[str, Any]) -> Outcome:
        if not answer or any(_is_open(each) for each in answer):
            return self._not_tried()
        try:
            return Outcome("right", self.judge(*answer, **context), exercise=self.name)
        except NotTried:
            return self._not_tried()
        except Wrong as wrong:
            message = wrong.message or self.misconceptions[wrong.misconception].format(**wrong.facts)
            return Outcome("wrong", message, wrong.misconception, self.name)

    def _not_tried(self) -> Outcome:
        return Outcome("not tried", f"{self.question} Then run the cell again.", exercise=self.name)

    def hint(self, number: int | None = None) -> Shown:
        """Returns the next hint, or the one with a number (from 1)."""
        given = sum(each.outcome == "hint" for each in attempts(self.name))
        number = min(given + 1, len(self.hints)) if number is None else number
        if not 1 <= number <= len(self.hints):
            return Shown("There is no such hint:", f"this exercise has {len(self.hints)}.")
        record(self.name, "hint")
        send_soon()
        return Shown(f"Hint {number} of {len(self.hints)}:", self.hints[number - 1])

    def solution(self) -> Shown:
        """Returns the solution after two wrong answers or a right one, when the teacher opened it, or with `QLORA_TEACHER=1`."""
        seen = [each.outcome for each in attempts(self.name)]
        wrong, is_teacher = seen.count("wrong"), os.environ.get("QLORA_TEACHER") == "1"
        if not (is_teacher or wrong >= TRIES or "right" in seen or self.name in released().solutions):
            left = TRIES - wrong
            return Shown(
                "Not yet:", f"the solution opens after {left} more answer{'s' * (left > 1)}. Try a hint first."
            )
        record(self.name, "solution")
        if isinstance(self.solution_is, str):
            return Shown("Solution:", self.solution_is)
        return Shown("Solution:", source_of(self.solution_is), code=True)


def source_of(function: Callable[..., Any]) -> str:
    """Returns a function's source without indentation."""
    return textwrap.dedent(inspect.getsource(function)).strip()


def _is_open(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(_is_open(each) for each in value.values())
    return value is ... or value is None


def call(function: Any, *arguments: Any, what: str = "your function") -> Any:
    """Calls a learner's function.

    Args:
        function: the learner's.
        arguments: handed to it.
        what: how messages name it.

    Raises:
        NotTried: it returns `...` or `None`, or raises `NotImplementedError`.
        Wrong: it is no function, or raises.
    """
    if not callable(function):
        raise Wrong(message=f"Hand over the function itself, without calling it; got {_short(repr(function))}.")
    try:
        result = function(*arguments)
    except NotImplementedError:
        raise NotTried from None
    except Exception as error:  # a learner's code may raise anything, and is told so in one line
        place = _place(error, function)
        raise Wrong(message=f"{what.capitalize()} raised {type(error).__name__}{place}: {_short(str(error))}") from None
    if _is_open(result):
        raise NotTried
    return result


def _place(error: Exception, function: Any) -> str:
    """The line of the learner's function that an error came from."""
    if not isinstance(function, FunctionType):
        return ""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is function.__code__:
            line = trace.tb_lineno - function.__code__.co_firstlineno + 1
        trace = trace.tb_next
    return f" in its line {line}" if line else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:119] + "…"


def number_of(value: Any, what: str = "the answer") -> float:
    """Returns a learner's number.

    Raises:
        Wrong: it is none.
    """
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(message=f"{what.capitalize()} must be a number; got {_short(repr(value))}.") from None


def distinct(draw: Callable[[], tuple[Any, Mapping[str, float]]]) -> tuple[Any, Mapping[str, float]]:
    """Draws a case until every wrong answer to it differs from the right one and from each other, so that none is misread.

    Args:
        draw: returns a case and its values by name, the right one among them.
    """
    for _ in range(1000):
        case, values = draw()
        rounded = {round(value, 6) for value in values.values()}
        if len(rounded) == len(values):
            return case, values
    raise AssertionError("no case tells these answers apart")
