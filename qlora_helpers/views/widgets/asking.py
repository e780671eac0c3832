"""Asking two models the same question in a thread of its own, so that the kernel stays free; holds the conversation with each.

This module knows no model and no widgets: it takes a function that answers, and functions that show what has come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from qlora_helpers.base.errors import UserError
from qlora_helpers.data.examples import Example
from qlora_helpers.evaluation.conversation import Begun, Conversation, Ended, Note, Piece

SIDES = ("left", "right")
MODELS = {"base": "untuned", "tuned": "tuned"}
DRAW_EVERY_S = 0.05


class Answer(Protocol):
    """A function that answers; `ql.streaming_answers` makes one for a run.

    The panel calls it in a thread, one call after the other. When a person presses Stop, the iterator is closed after its current
    piece, if it has a `close` method. A `UserError` is shown as it is, any other error with its type. An attribute `models` says
    who can be asked (the name, and what people read); without it `MODELS`.
    """

    def __call__(
        self, asked: Conversation, *, model: str, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> Iterator[Piece]:
        """Yields the answer to a conversation in pieces as they come: a text for each token, and records of all else.

        Args:
            asked: the conversation, which ends with a question.
            model: who is asked.
            temperature: of the sampling; 0 takes the likeliest token each time.
            top_p: sample from the likeliest tokens that make up this share.
            max_new_tokens: the length of the longest answer, in tokens.
            seed: of the sampling.
        """
        ...


@dataclass
class AnswerProgress:
    """An answer as far as it has come.

    Attributes:
        model: who answers.
        settings: how it was asked.
        text: the text so far.
        state: `waiting`, `writing`, `done`, `stopped` or `failed`.
        seconds: time since the model was asked.
        tokens: of the answer so far.
        prompt_tokens: of the prompt; None while it is not known.
        by_itself: whether the answer ended by itself; None where that is not known.
        doing: what goes on before the first token, such as loading the model.
        notes: what was trimmed from the question, and what else there is to know.
    """

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    state: str = "waiting"
    seconds: float = 0.0
    tokens: int = 0
    prompt_tokens: int | None = None
    by_itself: bool | None = None
    doing: str = ""
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Returns the state in words, with tokens and time once there is text."""
        if self.state == "waiting":
            return self.doing or "is waiting for its turn"
        count = f"{self.tokens} token{'s' * (self.tokens != 1)}"
        if self.state == "done" and self.by_itself is not None:
            ending = f"ended by itself after {count}" if self.by_itself else f"cut off at {count}"
        else:
            words = {"writing": "is writing", "done": "done", "stopped": "stopped", "failed": "failed"}[self.state]
            ending = f"{words}, {count}" if self.tokens else words
        prompt = f"; prompt {self.prompt_tokens} tokens" if self.prompt_tokens is not None else ""
        return f"{ending}, {self.seconds:.1f} s{prompt}" if self.tokens else f"{ending}{prompt}"

    def take(self, piece: Piece) -> None:
        """Adds what has come."""
        if isinstance(piece, Note):
            self.doing = piece.text
        elif isinstance(piece, Begun):
            self.prompt_tokens, self.doing = piece.prompt_tokens, "is reading the question"
            self.notes = tuple(text for text in (piece.trimmed, piece.remark) if text)
        elif isinstance(piece, Ended):
            self.tokens, self.by_itself = piece.tokens, piece.by_itself
        else:
            self.text, self.tokens, self.state = self.text + piece, self.tokens + 1, "writing"


@dataclass
class Turn:
    """A question and both answers to it.

    Attributes:
        question: what was asked.
        answers: by side, `left` and `right`.
        vote: `left`, `right` or `tie`, once somebody has voted.
    """

    question: str
    answers: dict[str, AnswerProgress]
    vote: str = ""


class Asking:
    """A conversation with two models at once, and what comes of it.

    Args:
        answer: the function that answers; see `Answer`.
        changed: called with the sides whose answers have changed, often from the thread.
        failed: called with a message if a model can't answer.
        ended: called when both models have answered or can't.

    Attributes:
        turns: the conversation so far.
        row: the row of the data that it begins with, if it does.
    """

    def __init__(
        self, answer: Answer, *, changed: Callable[..., None], failed: Callable[[str], None], ended: Callable[[], None]
    ) -> None:
        self.answer, self.turns = answer, list[Turn]()
        self.row: Example | None = None
        self._changed, self._failed, self._ended = changed, failed, ended
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def answers(self) -> dict[str, AnswerProgress]:
        """The answers to the last question, by side; empty before the first."""
        return self.turns[-1].answers if self.turns else {}

    @property
    def models(self) -> dict[str, str]:
        """Who answers in this conversation, by side; empty before the first question."""
        return {side: progress.model for side, progress in self.answers.items()}

    def ask(
        self, question: str, models: Mapping[str, str], settings: Mapping[str, Any], *, row: Example | None = None
    ) -> None:
        """Asks both models and returns at once; goes on with the conversation where the models are those of the last question.

        Args:
            question: the next question.
            models: who is asked, by side.
            settings: keywords of `Answer` besides the model.
            row: a row that a new conversation begins with.
        """
        if self.turns and dict(models) != self.models:
            self.forget()
        if not self.turns:
            self.row = row
        self._start([*(turn.question for turn in self.turns), question], models, settings, keep=len(self.turns))

    def ask_again(self, models: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Asks the last question again; where a model is another one, all questions, so that its conversation is its own."""
        keep = len(self.turns) - 1 if dict(models) == self.models else 0
        self._start([turn.question for turn in self.turns], models, settings, keep=keep)

    def forget(self) -> None:
        """Begins a new conversation; does nothing while an answer is being written."""
        if not self.busy:
            self.turns, self.row = [], None
            self._changed(*SIDES)

    def stop(self) -> None:
        """Ends the answer that is being written after its next token and keeps its text."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until both models have answered and returns whether they have."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.busy

    def _start(self, questions: list[str], models: Mapping[str, str], settings: Mapping[str, Any], keep: int) -> None:
        self._stop.clear()
        new = [
            Turn(text, {side: AnswerProgress(models[side], dict(settings)) for side in SIDES})
            for text in questions[keep:]
        ]
        self.turns = [*self.turns[:keep], *new]
        self._changed(*SIDES)
        self._thread = threading.Thread(target=self._ask_both, args=(keep,), name="answers", daemon=True)
        self._thread.start()

    def _ask_both(self, first: int) -> None:
        try:
            for side in SIDES:
                for number in range(first, len(self.turns)):
                    if self._stop.is_set():
                        self.turns[number].answers[side].state = "stopped"
                    else:
                        self._ask(side, number)
        except UserError as error:
            self._failed(str(error))
        except Exception as error:  # this is the top of the thread, where nobody else would see the error
            self._failed(f"{type(error).__name__}: {error}")
        finally:
            for turn in self.turns[first:]:
                for progress in turn.answers.values():
                    if progress.state in ("waiting", "writing"):
                        progress.state = "failed"
            self._changed(*SIDES)
            self._ended()

    def _conversation(self, side: str, number: int) -> Conversation:
        """Returns the questions and answers of a side before a question, and the question."""
        before = [text for turn in self.turns[:number] for text in (turn.question, turn.answers[side].text)]
        return Conversation((*before, self.turns[number].question), self.row)

    def _ask(self, side: str, number: int) -> None:
        progress = self.turns[number].answers[side]
        started = drawn = time.monotonic()
        pieces = self.answer(self._conversation(side, number), model=progress.model, **progress.settings)
        try:
            for piece in pieces:
                progress.take(piece)
                progress.seconds = time.monotonic() - started
                if self._stop.is_set() and not isinstance(piece, Ended):
                    break
                if not isinstance(piece, str) or time.monotonic() - drawn > DRAW_EVERY_S:
                    self._changed(side)
                    drawn = time.monotonic()
        finally:
            if hasattr(pieces, "close"):
                pieces.close()
        progress.seconds = time.monotonic() - started
        progress.state = "stopped" if self._stop.is_set() and progress.by_itself is None else "done"
        self._changed(side)
