"""The board as a page without scripts: the table, what goes wrong, buttons for the teacher, and the class's pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from qlora_helpers.base.style import stylesheet
from qlora_helpers.teaching.board import MARKS, groups_of
from qlora_helpers.teaching.exercise import Exercise
from qlora_helpers.teaching.exercises import all_exercises
from qlora_helpers.teaching.releases import Release, next_shown

if TYPE_CHECKING:
    from qlora_helpers.teaching.board import Board, Seat


def board_page(board: Board, *, refresh_s: int, action: str) -> str:
    """Returns the page; as `Board.page`."""
    head = "".join(
        f'<th scope="col" title="{escape(each.title)}">{number}</th>'
        for number, each in enumerate(board.exercises, start=1)
    )
    body = "".join(_row(seat, board.exercises) for seat in board.seats)
    listed = "".join(_listed(each, board.release, action) for each in board.exercises)
    wrong = "".join(
        f"<li><b>{count}</b> {escape(title)}: {escape(text)}</li>" for title, text, count in board.misconceptions
    )
    return _PAGE.format(
        refresh=int(refresh_s),
        colours=stylesheet("colours"),
        summary=escape(board.summary),
        clock=time.strftime("%H:%M:%S"),
        head=head,
        body=body,
        listed=listed,
        shown=_shown(board.release, board.lesson, action),
        pictures="".join(f"<figure>{picture.svg()}</figure>" for picture in board.pictures)
        or "<p>Nobody has shared a run yet.</p>",
        form="'self'" if action else "'none'",
        wrong=wrong or "<li>None was recognised yet.</li>",
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
