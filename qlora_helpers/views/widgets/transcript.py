"""A conversation as HTML: each question with its answer, how it was asked, how it ended and what was trimmed. All is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from qlora_helpers.base.text import plain
from qlora_helpers.data.examples import Example
from qlora_helpers.views.widgets.asking import AnswerProgress, Turn

SHORT = 400  # characters of a question that are always seen above its answer
VOTED = {"left": "voted: the left answer", "right": "voted: the right answer", "tie": "voted: as good"}


def settings_text(settings: Mapping[str, Any]) -> str:
    """Returns how an answer was asked for, in words."""
    if not settings.get("temperature"):
        return f"greedy, at most {settings.get('max_new_tokens', '?')} tokens"
    return (
        f"temperature {settings['temperature']:g}, top_p {settings['top_p']:g}, seed {settings['seed']}, at most "
        f"{settings['max_new_tokens']} tokens"
    )


def before_html(row: Example | None) -> str:
    """Returns what a row of the data has before its last question; empty where it has nothing."""
    last = max((n for n, message in enumerate(row.messages) if message.role == "user"), default=0) if row else 0
    if row is None or not last:
        return ""
    texts = "".join(
        f'<div><span class="muted">{html.escape(each.role)}</span> {html.escape(plain(each.content))}</div>'
        for each in row.messages[:last]
    )
    count = f"{last} message{'s' * (last != 1)}"
    return f"<details><summary>{html.escape(plain(row.id))} has {count} before this question</summary>{texts}</details>"


def turn_html(turn: Turn, side: str, *, ending: bool) -> str:
    """Returns a question with the answer of one side, and with how it ended where nothing else shows that."""
    progress = turn.answers[side]
    notes = "".join(f'<div class="qlora-trimmed">{html.escape(plain(note))}</div>' for note in progress.notes)
    how = [settings_text(progress.settings), progress.describe() if ending else "", VOTED.get(turn.vote, "")]
    return (
        f'<div class="qlora-asked">{question_html(plain(turn.question).strip())}</div>{notes}'
        f'<div class="qlora-said">{answer_html(progress)}</div>'
        f'<div class="muted qlora-how">{html.escape("; ".join(filter(None, how)))}</div>'
    )


def question_html(question: str) -> str:
    """Returns a question; the end of a long one is folded."""
    if len(question) <= SHORT:
        return html.escape(question)
    end = question.rfind(" ", SHORT // 2, SHORT)  # not within a word, where there are any
    end = SHORT if end < 0 else end
    rest = f"<details><summary>the other {len(question) - end:,} characters</summary>{html.escape(question[end:])}</details>"
    return f"{html.escape(question[:end])} …{rest}"


def answer_html(progress: AnswerProgress) -> str:
    """Returns an answer as far as it has come, with a cursor while it is written."""
    text = html.escape(plain(progress.text).strip())
    if progress.text and not text:
        so_far = " so far" if progress.state == "writing" else ""
        text = f'<span class="muted">only white space{so_far}</span>'
    return f"{text}▌" if progress.state == "writing" else text
