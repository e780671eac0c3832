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
from html import escape

from qlora_helpers.base.style import stylesheet
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.text import plain
from qlora_helpers.teaching.attempts import Attempt
from qlora_helpers.teaching.drawings.canvas import Drawing
from qlora_helpers.teaching.exercise import Exercise
from qlora_helpers.teaching.exercises import BY_NOTEBOOK, all_exercises
from qlora_helpers.teaching.measured import Measured
from qlora_helpers.teaching.pooled_plot import pooled
from qlora_helpers.teaching.releases import Release, next_shown

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
        return Table(header, rows, caption=self._summary, notes=self._notes, numbers={len(header) - 2})

    @property
    def _summary(self) -> str:
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
        head = "".join(
            f'<th scope="col" title="{escape(each.title)}">{number}</th>'
            for number, each in enumerate(self.exercises, start=1)
        )
        body = "".join(_row(seat, self.exercises) for seat in self.seats)
        listed = "".join(_listed(each, self.release, action) for each in self.exercises)
        wrong = "".join(
            f"<li><b>{count}</b> {escape(title)}: {escape(text)}</li>" for title, text, count in self.misconceptions
        )
        return _PAGE.format(
            refresh=int(refresh_s),
            colours=stylesheet("colours"),
            summary=escape(self._summary),
            clock=time.strftime("%H:%M:%S"),
            head=head,
            body=body,
            listed=listed,
            shown=_shown(self.release, self.lesson, action),
            pictures="".join(f"<figure>{picture.svg()}</figure>" for picture in self.pictures)
            or "<p>Nobody has shared a run yet.</p>",
            form="'self'" if action else "'none'",
            wrong=wrong or "<li>None was recognised yet.</li>",
        )


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


def _listed(exercise: Exercise, release: Release, action: str) -> str:
    """An exercise in the page's list, with whether its solution is open, and else a button that opens it."""
    text = f"{escape(exercise.title)} ({exercise.minutes} min)"
    if exercise.name in release.solutions:
        text += ' <span class="opened">solution open for everybody</span>'
    elif action:
        text += " " + _button(action, "solution", exercise.name, "Open the solution for everybody", exercise.title)
    return f"<li>{text}</li>"


def _shown(release: Release, lesson: Sequence[str], action: str) -> str:
    """What the class has come to, and a button that shows the next notebook's exercises."""
    known = all_exercises()
    titles = [escape(known[name].title) for name in release.shown if name in known]
    text = f"<p>Shown to the class: {', '.join(titles)}.</p>" if titles else ""
    following = next_shown(release, groups_of(lesson or None))
    if action and following:
        listed = " and ".join(known[name].title for name in following)
        text += f"<p>{_button(action, 'show', 'next', f'Show the next: {listed}')}</p>"
    return text


def _button(action: str, name: str, value: str, text: str, about: str = "") -> str:
    label = f' aria-label="{escape(f"{text}: {about}")}"' if about else ""
    return (
        f'<form method="post" action="{escape(action)}"><button name="{name}" value="{escape(value)}"{label}>'
        f"{escape(text)}</button></form>"
    )


def _row(seat: Seat, exercises: Sequence[Exercise]) -> str:
    cells = "".join(
        f'<td class="{state or "none"}" aria-label="{state or "not begun"}">{MARKS[state]}</td>'
        for state in (seat.states.get(each.name, "") for each in exercises)
    )
    kind = ' class="stuck"' if seat.stuck else ""
    return f'<tr{kind}><th scope="row">{escape(seat.name)}</th>{cells}<td>{seat.minutes:.0f}</td><td>{escape(seat.stuck)}</td></tr>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{refresh}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; form-action {form}">
<meta name="viewport" content="width=device-width"><title>Board</title><style>
{colours}
:root {{ color-scheme: light dark; }}
body {{ font: 15px system-ui, sans-serif; margin: 1.5rem; }}
body {{ color: light-dark(#1c1e21, #e6e6e6); background: light-dark(#fff, #16181b); }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid light-dark(#c9ccd1, #44484e); padding: .3rem .55rem; text-align: center; }}
th[scope=row], td:last-child {{ text-align: left; }}
.right {{ background: #1e7d34; color: #fff; }}
.wrong {{ background: #b3261e; color: #fff; }}
.open {{ background: #f3c13a; color: #1c1e21; }}
.stuck th {{ outline: 3px solid light-dark(#b3261e, #ff8a80); outline-offset: -3px; }}
.key span {{ padding: .1rem .5rem; margin-right: .6rem; }}
li {{ margin: .2rem 0; }}
form {{ display: inline; }}
button {{ font: inherit; padding: .15rem .6rem; cursor: pointer; }}
.opened {{ font-weight: 600; }}
figure {{ margin: 0 0 1rem; }}
figure svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{summary}</h1>
<p class="key"><span class="right">✓ right</span><span class="wrong">✗ wrong</span><span class="open">· looked at</span>
at {clock}</p>
<table><thead><tr><th scope="col">seat</th>{head}<th scope="col">min</th><th scope="col">stuck</th></tr></thead>
<tbody>{body}</tbody></table>
<h2>Commonest wrong answers</h2><ul>{wrong}</ul>
<h2>Exercises</h2>{shown}<ol>{listed}</ol>
<h2>Runs of the class</h2>{pictures}
</body></html>
"""
