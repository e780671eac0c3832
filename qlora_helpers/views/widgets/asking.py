"""Asking two models the same question in a thread of its own, so that the kernel stays free.

This module knows no model and no widgets: it is handed a function that answers, and functions that show what has come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from qlora_helpers.base.errors import UserError

MODELS = {"base": "untuned", "tuned": "tuned"}
DRAW_EVERY_S = 0.05


class Answer(Protocol):
    """A function that answers; `workflow.streaming_answers` makes one for a run.

    The panel calls it in a thread, one call after the other. When a person presses Stop, the iterator is closed after its current
    piece, if it has a `close` method. A `UserError` is shown as it is, any other error with its type.
    """

    def __call__(
        self, dialogue: str, *, tuned: bool, temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[str]:
        """Yields the answer to a dialogue in pieces of text as they come.

        Args:
            dialogue: one turn per line.
            tuned: whether the adapters are on.
            temperature: of the sampling; 0 takes the likeliest token each time.
            top_p: sample from the likeliest tokens that make up this share.
            max_new_tokens: the length of the longest answer, in tokens.
        """
        ...


@dataclass
class AnswerProgress:
    """An answer as far as it has come.

    Attributes:
        text: the text so far.
        state: `waiting`, `writing`, `done`, `stopped` or `failed`.
        seconds: time since the model was asked.
    """

    text: str = ""
    state: str = "waiting"
    seconds: float = 0.0

    def describe(self) -> str:
        """Returns the state in words, with the time once there is text."""
        if self.state == "waiting":
            return "is waiting for its turn"
        words = {"writing": "is writing", "done": "done", "stopped": "stopped", "failed": "failed"}[self.state]
        return f"{words}, {self.seconds:.1f} s" if self.text else words


class Asking:
    """Asks the untuned and then the tuned model, and reports what comes.

    Args:
        answer: the function that answers; see `Answer`.
        changed: called with the names of the answers that have changed, often from the thread.
        failed: called with a message if a model can't answer.
        ended: called when both models have answered or can't.

    Attributes:
        answers: `base` and `tuned` for the dialogue asked last; empty before the first.
        dialogue: the dialogue asked last.
    """

    def __init__(
        self, answer: Answer, *, changed: Callable[..., None], failed: Callable[[str], None], ended: Callable[[], None]
    ) -> None:
        self.answer, self.answers, self.dialogue = answer, dict[str, AnswerProgress](), ""
        self._changed, self._failed, self._ended = changed, failed, ended
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, dialogue: str, settings: dict[str, Any]) -> None:
        """Asks both models about a dialogue and returns at once."""
        self._stop.clear()
        self.dialogue, self.answers = dialogue, {name: AnswerProgress() for name in MODELS}
        self._changed(*MODELS)
        self._thread = threading.Thread(target=self._ask_both, args=(settings,), name="answers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the answer that is being written after its next piece and keeps its text."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until both models have answered and returns whether they have."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.busy

    def _ask_both(self, settings: dict[str, Any]) -> None:
        try:
            for name, progress in self.answers.items():
                if self._stop.is_set():
                    progress.state = "stopped"
                else:
                    self._ask(name, progress, settings)
        except UserError as error:
            self._failed(str(error))
        except Exception as error:  # this is the top of the thread, where nobody else would see the error
            self._failed(f"{type(error).__name__}: {error}")
        finally:
            for progress in self.answers.values():
                if progress.state in ("waiting", "writing"):
                    progress.state = "failed"
            self._changed(*MODELS)
            self._ended()

    def _ask(self, name: str, progress: AnswerProgress, settings: dict[str, Any]) -> None:
        started = drawn = time.monotonic()
        pieces = self.answer(self.dialogue, tuned=name == "tuned", **settings)
        try:
            for piece in pieces:
                progress.text, progress.state = progress.text + piece, "writing"
                progress.seconds = time.monotonic() - started
                if self._stop.is_set():
                    break
                if time.monotonic() - drawn > DRAW_EVERY_S:
                    self._changed(name)
                    drawn = time.monotonic()
        finally:
            if hasattr(pieces, "close"):
                pieces.close()
        progress.seconds = time.monotonic() - started
        progress.state = "stopped" if self._stop.is_set() else "done"
        self._changed(name)
