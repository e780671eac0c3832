"""A teacher's board: seats by exercises in colours, who is stuck, the commonest wrong answers, and the class's runs in pictures.

Owns what the lines of many learners' `attempts.jsonl` mean together. Where the lines come from is `collecting`'s business. All
that learners send is untrusted text: only known exercises, outcomes and misconceptions count, and a seat's name is cut, cleaned
and escaped.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.text import plain
from qlora_helpers.teaching.attempts import Attempt
from qlora_helpers.teaching.drawings.canvas import Drawing
from qlora_helpers.teaching.exercise import Exercise
from qlora_helpers.teaching.exercises import BY_NOTEBOOK, all_exercises
from qlora_helpers.teaching.measured import Measured
from qlora_helpers.teaching.pooled_plot import pooled
from qlora_helpers.teaching.releases import Release

OUTCOMES = ("not tried", "wrong", "right", "hint", "solution")
MARKS = {"": "", "right": "✓", "wrong": "✗", "open": "·"}
STUCK_TIMES = 1.5  # of the planned minutes without a line
EQUAL_ANSWERS = 3
AWAY_MINUTES = 120.0  # without a line: nobody sits there any more, or all are at lunch
MOST_SEATS = 300
REFRESH_S = 10


@dataclass(frozen=True)
class Seat:
    """One learner.

    Attributes:
        name: what the learner's lines call the seat.
        states: exercise -> `right`, `wrong` or `open` (looked at, not answered).
        minutes: since the last line.
        stuck: why help may be welcome, in a few words; empty where it is not.
    """

    name: str
    states: dict[str, str]
    minutes: float
    stuck: str = ""


@dataclass(frozen=True)
class Board(Tabular):
    """What a class has done; prints as a table, and `page()` is a page that refreshes itself.

    Attributes:
        exercises: the columns.
        seats: the rows.
        misconceptions: exercise, wrong answer, and how many seats gave it; the commonest first.
        pictures: of the runs that the class has shared.
        release: what the teacher has opened.
        lesson: the lesson's exercises; empty for all of the course.
    """

    exercises: tuple[Exercise, ...]
    seats: tuple[Seat, ...]
    misconceptions: tuple[tuple[str, str, int], ...]
    pictures: tuple[Drawing, ...] = ()
    release: Release = Release()
    lesson: tuple[str, ...] = ()

    def table(self) -> Table:
        """Returns a row for each seat: its exercises, minutes since its last line, and why it may be stuck."""
        header = ["seat", *(str(number) for number in range(1, len(self.exercises) + 1)), "min", "stuck"]
        rows = [
            [
                seat.name,
                *(MARKS[seat.states.get(each.name, "")] for each in self.exercises),
                f"{seat.minutes:.0f}",
                seat.stuck,
            ]
            for seat in self.seats
        ]
        return Table(header, rows, caption=self.summary, notes=self._notes, numbers={len(header) - 2})

    @property
    def summary(self) -> str:
        """How many seats there are, and how many may be stuck."""
        stuck = sum(bool(seat.stuck) for seat in self.seats)
        return f"{len(self.seats)} seats, {stuck} may be stuck"

    @property
    def _notes(self) -> list[str]:
        numbered = [f"{number} {each.title}" for number, each in enumerate(self.exercises, start=1)]
        said = [f"{count} seats, {title}: {text}" for title, text, count in self.misconceptions]
        opened = (
            [f"Solutions open for everybody: {', '.join(self.release.solutions)}"] if self.release.solutions else []
        )
        notes = ["; ".join(numbered), *(["Commonest wrong answers:", *said] if said else []), *opened]
        return [*notes, *(repr(picture) for picture in self.pictures)]

    def page(self, *, refresh_s: int = REFRESH_S, action: str = "") -> str:
        """Returns an HTML page without scripts that the browser loads again every `refresh_s` seconds.

        Args:
            refresh_s: seconds.
            action: where buttons that open solutions and show exercises post to; empty for a page without buttons.
        """
        from qlora_helpers.teaching.board_page import board_page

        return board_page(self, refresh_s=refresh_s, action=action)


def make_board(
    attempts: Iterable[Attempt],
    runs: Iterable[Measured] = (),
    *,
    release: Release | None = None,
    exercises: Sequence[str] | None = None,
    now: float | None = None,
) -> Board:
    """Makes a board of the lines of many learners.

    Args:
        attempts: in any order; lines of unknown exercises or outcomes are left out.
        runs: those that learners have shared.
        release: what the teacher has opened; None is nothing.
        exercises: the names of those that the lesson has, in its order; None takes those that somebody has touched or that the
            teacher has shown.
        now: seconds since 1970; None takes the clock.
    """
    known, now = all_exercises(), time.time() if now is None else now
    by_seat: dict[str, list[Attempt]] = defaultdict(list)
    for each in attempts:
        if each.exercise in known and each.outcome in OUTCOMES:
            name = seat_name(each.seat)
            if name in by_seat or len(by_seat) < MOST_SEATS:
                by_seat[name].append(each)
    release = release or Release()
    touched = {each.exercise for several in by_seat.values() for each in several} | {*release.shown}
    chosen = [known[name] for name in known if name in touched] if exercises is None else [known[n] for n in exercises]
    seats = [_seat(name, sorted(lines, key=lambda each: each.time), chosen, now) for name, lines in by_seat.items()]
    seats.sort(key=lambda seat: (not seat.stuck, [int(p) if p.isdecimal() else 0 for p in [seat.name]], seat.name))
    wrong, lesson = _misconceptions(by_seat, chosen), tuple(exercises or ())
    return Board(tuple(chosen), tuple(seats), wrong, pooled(runs), release, lesson)


def groups_of(names: Sequence[str] | None = None) -> list[list[str]]:
    """Returns exercises in groups of one notebook each, as a teacher shows them one after another.

    Args:
        names: those of the lesson, in its order; None takes all, in the order of the course.
    """
    notebook = {each.name: name for name, several in BY_NOTEBOOK.items() for each in several}
    groups: dict[str, list[str]] = {}
    for name in notebook if names is None else names:
        groups.setdefault(notebook[name], []).append(name)
    return list(groups.values())


def seat_name(text: str) -> str:
    """Returns a seat's name as it is shown: one line of at most 20 characters, without control characters."""
    return " ".join(plain(text).split())[:20] or "?"


def _seat(name: str, lines: list[Attempt], exercises: Sequence[Exercise], now: float) -> Seat:
    states: dict[str, str] = {}
    for line in lines:
        if states.get(line.exercise) != "right":
            states[line.exercise] = (
                line.outcome if line.outcome in ("right", "wrong") else states.get(line.exercise, "open")
            )
    minutes = max(0.0, (now - min(lines[-1].time, now)) / 60)
    return Seat(name, states, minutes, _stuck(lines, states, exercises, minutes))


def _stuck(lines: list[Attempt], states: dict[str, str], exercises: Sequence[Exercise], minutes: float) -> str:
    """Why a seat may be stuck: three equal wrong answers, or nothing for half as long again as the exercise is planned for."""
    if minutes > AWAY_MINUTES or (exercises and all(states.get(each.name) == "right" for each in exercises)):
        return ""
    last = lines[-1]
    wrong = [each.misconception for each in lines if each.exercise == last.exercise and each.outcome == "wrong"]
    if (
        states[last.exercise] != "right"
        and len(wrong) >= EQUAL_ANSWERS
        and len({*wrong[-EQUAL_ANSWERS:]}) == 1
        and wrong[-1]
    ):
        return f"{EQUAL_ANSWERS} times the same wrong answer"
    current = _current(last, states, exercises)
    if current is not None and minutes > STUCK_TIMES * current.minutes:
        return f"nothing for {minutes:.0f} min"
    return ""


def _current(last: Attempt, states: dict[str, str], exercises: Sequence[Exercise]) -> Exercise | None:
    """The exercise that somebody sits at: the one touched last or, where that is right, the next one that is not."""
    if states[last.exercise] != "right":
        return all_exercises()[last.exercise]
    names = [each.name for each in exercises]
    start = names.index(last.exercise) + 1 if last.exercise in names else 0
    return next((each for each in exercises[start:] if states.get(each.name) != "right"), None)


def _misconceptions(
    by_seat: dict[str, list[Attempt]], exercises: Sequence[Exercise], most: int = 5
) -> tuple[tuple[str, str, int], ...]:
    """The commonest recognised wrong answers: the exercise's title, the misconception's code, and how many seats gave it."""
    counts: Counter[tuple[str, str]] = Counter()
    chosen = {each.name: each for each in exercises}
    for lines in by_seat.values():
        counts.update(
            {
                (each.exercise, each.misconception)
                for each in lines
                if each.exercise in chosen and each.misconception in chosen[each.exercise].misconceptions
            }
        )
    return tuple(
        (chosen[name].title, code.replace("-", " "), count) for (name, code), count in counts.most_common(most)
    )
