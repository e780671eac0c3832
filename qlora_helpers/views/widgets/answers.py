"""A panel that holds a conversation with two models at once and shows both answers as they are written.

It knows no model: it takes a function that answers, which `asking` calls in a thread, and one that keeps votes. What people and
models write is escaped and never executed.
"""

from __future__ import annotations

import html
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tables import Table
from qlora_helpers.base.text import plain
from qlora_helpers.evaluation.votes import Vote, plain_settings
from qlora_helpers.views.widgets.answer_controls import Controls
from qlora_helpers.views.widgets.asking import MODELS, SIDES, Answer, AnswerProgress, Asking
from qlora_helpers.views.widgets.panel import Panel, error_html
from qlora_helpers.views.widgets.samples import as_sample
from qlora_helpers.views.widgets.transcript import before_html, settings_text, turn_html

HIDDEN = {"left": "A", "right": "B"}
KeepVote = Callable[[Vote], str]


def answer_panel(
    answer: Answer,
    dialogues: Sequence[Any] = (),
    *,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_new_tokens: int = 80,
    seed: int = 0,
    vote: KeepVote | None = None,
) -> AnswerPanel:
    """Makes a panel that asks a function as two models: the untuned and the tuned one, or any two that the function knows.

    Args:
        answer: the function that answers; see `asking.Answer`. `ql.streaming_answers(run)` makes one, whose model is loaded when
            the first question comes.
        dialogues: what to pick from: texts, rows of the data, or mappings with `dialogue`, `summary` and `id`.
        temperature, top_p, max_new_tokens, seed: where the controls start.
        vote: keeps a vote and returns what to show of all votes; None has no buttons to vote.

    Raises:
        UserError: an item of `dialogues` has no dialogue.
    """
    values = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    return AnswerPanel(answer, dialogues, values, vote)


class AnswerPanel(Panel):
    """A question, the settings and two conversations; the arguments are those of `answer_panel`.

    Attributes:
        examples: what to pick from.
    """

    def __init__(
        self, answer: Answer, dialogues: Sequence[Any], values: Mapping[str, Any], vote: KeepVote | None
    ) -> None:
        self.asking = Asking(answer, changed=self._draw, failed=self._show_error, ended=self._enable)
        self.examples = tuple(as_sample(item, number) for number, item in enumerate(dialogues, start=1))
        self.models: Mapping[str, str] = getattr(answer, "models", MODELS)
        self._keep_vote, self._swapped, self._hidden = vote, False, False
        self._typing = False  # whether the row is deselected because its text was changed
        self._begin = True  # whether the next question begins a new conversation
        self._enabling = threading.RLock()  # the answering thread's last word is not replaced by what was true before
        self.controls = Controls([each.name for each in self.examples], self.models, values, can_vote=vote is not None)
        self.controls.question.value = self.examples[0].dialogue if self.examples else ""
        actions: dict[str, Callable[[], Any]] = {
            "ask": self.ask,
            "again": self.ask_again,
            "stop": self.stop,
            "new": self.new_conversation,
        }
        self.box = self.controls.lay_out(
            actions | {name: (lambda name=name: self.vote(name)) for name in ("left", "tie", "right")}
        )
        self.controls.pick.observe(self._on_pick, names="value")
        self.controls.question.observe(self._on_question, names="value")
        for each in (*self.controls.models.values(), self.controls.temperature, self.controls.top_p):
            each.observe(lambda _: self._draw(*SIDES), names="value")
        for each in (self.controls.length, self.controls.seed):
            each.observe(lambda _: self._draw(*SIDES), names="value")
        self._draw(*SIDES)
        self._enable()

    # what a person does

    @property
    def answers(self) -> dict[str, AnswerProgress]:
        """The answers to the last question, `left` and `right`."""
        return self.asking.answers

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return self.asking.busy

    def ask(self) -> None:
        """Asks both models the shown question and returns at once; does nothing while they answer."""
        question = self.controls.question.value
        if self.busy:
            return
        if not question.strip():
            self._show_error("There is nothing to ask. Type a question, or pick a row of the data.")
            return
        self.controls.message.value = ""
        if self._begin:
            self.asking.forget()
        if not self.asking.turns:
            self._hidden = self.controls.blind.value
            self._swapped = self._hidden and random.random() < 0.5
        sample = self.examples[self.controls.pick.value] if self.controls.pick.value >= 0 else None
        self._begin = False
        self.asking.ask(question, self._chosen(), self.controls.settings(), row=sample.row if sample else None)
        self.controls.question.value = ""
        self._enable()

    def ask_again(self) -> None:
        """Asks the last question again, with the models and settings as they are now."""
        if self.busy or not self.asking.turns:
            return
        self.controls.message.value = ""
        self.asking.ask_again(self._chosen(), self.controls.settings())
        self._enable()

    def stop(self) -> None:
        """Ends the answer that is being written after its next token and keeps its text."""
        self.asking.stop()

    def new_conversation(self) -> None:
        """Forgets the conversation; its last question comes back to be changed."""
        if self.busy:
            return
        if not self.controls.question.value.strip() and self.asking.turns:
            self.controls.question.value = self.asking.turns[-1].question
        self._begin, self._hidden = True, False
        self.asking.forget()
        self._enable()

    def vote(self, better: str) -> None:
        """Keeps which answer to the last question is better: `left`, `right` or `tie`."""
        if self._keep_vote is None or not self._votable():
            return
        turn = self.asking.turns[-1]
        left, right = (turn.answers[side] for side in SIDES)
        vote = Vote(
            left.model,
            right.model,
            better,
            self._hidden,
            turn.question,
            (left.text.strip(), right.text.strip()),
            plain_settings(left.settings),
            len(self.asking.turns),
        )
        try:
            summary = self._keep_vote(vote)
        except UserError as error:
            self._show_error(str(error))
            return
        turn.vote, self._hidden = better, False
        self.controls.votes.value = f'<span class="muted" role="status">{html.escape(plain(summary))}</span>'
        self._draw(*SIDES)
        self._enable()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until both models have answered and returns whether they have; meant for code."""
        return self.asking.wait(timeout_s)

    def _chosen(self) -> dict[str, str]:
        """Who is asked, by side."""
        names = [self.controls.models[side].value for side in SIDES]
        return dict(zip(SIDES, reversed(names) if self._swapped else names, strict=True))

    def _votable(self) -> bool:
        if not self.asking.turns or self.asking.turns[-1].vote or len(set(self.asking.models.values())) < 2:
            return False
        return all(each.state in ("done", "stopped") and each.tokens for each in self.answers.values())

    # what it looks like

    def _on_pick(self, change: dict[str, Any]) -> None:
        if self._typing:
            return
        self._begin = True
        self.controls.question.value = self.examples[change["new"]].dialogue if change["new"] >= 0 else ""
        self._draw(*SIDES)

    def _on_question(self, change: dict[str, Any]) -> None:
        """Shows `your own` once the box no longer holds the picked row; an edited question of a row stays in its place."""
        picked = self.controls.pick.value
        if picked >= 0 and self.examples[picked].row is None and change["new"] != self.examples[picked].dialogue:
            self._typing = True
            self.controls.pick.value = -1
            self._typing = False
        self._draw_reference()

    def _show_error(self, message: str) -> None:
        self.controls.message.value = error_html(message)

    def _enable(self) -> None:
        with self._enabling:
            thread_ends = self.busy and all(each.state not in ("waiting", "writing") for each in self.answers.values())
            busy = self.busy and not thread_ends
            self.controls.enable(busy=busy, asked=bool(self.asking.turns), votable=self._votable())

    def _name(self, side: str) -> str:
        """Who answers on a side, as far as a person may know it now."""
        asked = self.asking.models or self._chosen()
        return HIDDEN[side] if self._hidden else self.models.get(asked[side], asked[side])

    def _stale(self, side: str) -> str:
        """Says why the answers shown are not those that the controls would give now; empty where they are."""
        if not self.asking.turns:
            return ""
        if self._begin:
            return "answers of the conversation so far; the next question begins a new one"
        progress = self.answers[side]
        if progress.model != self._chosen()[side] and not self._hidden:
            return (
                f"answers of another model than is chosen now: asking begins a new conversation with {self._next(side)}"
            )
        if dict(progress.settings) != self.controls.settings():
            return f"answered with other settings than are set now: {settings_text(progress.settings)}"
        return ""

    def _next(self, side: str) -> str:
        return self.models.get(self._chosen()[side], "")

    def _draw(self, *sides: str) -> None:
        self.still_changed()
        for side in sides:
            name, stale = html.escape(self._name(side)), self._stale(side)
            progress = self.answers.get(side)
            state = html.escape(progress.describe()) if progress else ""
            note = f'<div class="qlora-stale">{html.escape(stale)}</div>' if stale else ""
            asked = self.asking.turns
            turns = before_html(self.asking.row) + "".join(  # the head says how the last answer ended
                turn_html(turn, side, ending=turn is not asked[-1]) for turn in asked
            )
            self.controls.shown[side].value = (
                f'<b>{name}</b> <span class="muted">{state}</span>{note}'
                f'<div class="qlora-text qlora-answer{" qlora-old" if stale else ""}" '
                f'aria-label="{name} answers" role="log" tabindex="0">{turns}</div>'
            )
        self._draw_reference()

    def _draw_reference(self) -> None:
        summary = self._summary()
        self.controls.reference.value = (
            f'<div class="muted">answer that a person wrote</div><div>{html.escape(plain(summary))}</div>'
            if summary
            else ""
        )

    def _summary(self) -> str:
        """Returns the reference of the question that was asked last, or of the one that is about to be asked."""
        shown = self.asking.turns[0].question if self.asking.turns and not self._begin else self.controls.question.value
        single = len(self.asking.turns) < 2 or self._begin
        return next((each.summary for each in self.examples if each.dialogue == shown), "") if single else ""

    # where there are no widgets

    def _rows(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        for turn in self.asking.turns:
            rows.append(("question", turn.question))
            rows += [(self._name(side), f"{p.text.strip()} [{p.describe()}]") for side, p in turn.answers.items()]
        if not rows:
            rows = [("question", self.controls.question.value)] if self.controls.question.value else []
            rows += [(self._name(side), "not asked yet") for side in SIDES]
        return rows + ([("reference", self._summary())] if self._summary() else [])

    def still_text(self) -> str:
        """Returns the conversation so far and the reference."""
        return "\n".join(f"{name:<10} {plain(text)}" for name, text in self._rows())

    def still_html(self) -> str:
        """Returns the same as a table."""
        return Table(["who", "text"], [(name, plain(text)) for name, text in self._rows()])._repr_html_()
