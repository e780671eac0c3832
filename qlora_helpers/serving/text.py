"""Turns an answer's tokens into text as they come: what a client has been sent is never taken back.

The text is that of `generate.answer_of`, so a reasoning model's thoughts and what it writes before its answer are held back until
the answer itself begins. Knows nothing of models and requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_helpers.base.text import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.templates import AnswerMarks

_ESCAPE_NEAR_END = 40  # characters in which a terminal code may still be open


class AnswerText:
    """The text of one answer.

    Args:
        tokenizer: the model's.
        marks: the tokens around an answer.
        prompt: the tokens that were asked; where they open a thought, the answer comes behind its end.
        stop: texts before which the answer ends.
        raw: whether the text is what goes on from the prompt, white space and thoughts included.

    Attributes:
        tokens: all tokens so far, the one that ended the answer included.
        ended: whether the answer has ended by itself or at a stop text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        marks: AnswerMarks,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> None:
        self._tokenizer, self._marks, self._stop, self._raw = tokenizer, marks, stop, raw
        before = "" if raw else tokenizer.decode(list(prompt[-8:]))
        self._thinks = before.rstrip().endswith("<think>")
        self._sent = ""
        self.tokens: list[int] = []
        self.ended = False

    def add(self, token: int) -> str:
        """Takes the next token and returns the text that is certain now and was not sent yet."""
        self.tokens.append(token)
        text = self._text()
        cut = min((place for each in self._stop if (place := text.find(each)) >= 0), default=None)
        self.ended = token in self._marks.ends or cut is not None
        return "" if self.ended or not self._has_begun(text) else self._new(self._certain(text))

    def rest(self) -> str:
        """Returns what was held back, once there are no more tokens."""
        text = self._text()
        cut = min((place for each in self._stop if (place := text.find(each)) >= 0), default=len(text))
        return self._new(text[:cut] if self._raw else text[:cut].rstrip())

    def _text(self) -> str:
        from qlora_helpers.evaluation.generate import answer_of

        if not self._raw:
            return plain(answer_of(self.tokens, self._tokenizer, self._marks).text)
        return plain(self._tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _has_begun(self, text: str) -> bool:
        """Whether the answer's own text has begun, and not what is written before it."""
        if self._raw:
            return True
        from qlora_helpers.evaluation.generate import behind_lead

        lead = self._marks.lead
        if lead and len(behind_lead(self.tokens, lead)) == len(self.tokens):
            return False
        whole = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        return "</think>" in whole if self._thinks or "<think>"[: len(whole.lstrip())] == whole.lstrip()[:7] else True

    def _certain(self, text: str) -> str:
        """The part of a text that no further token changes."""
        if text.endswith("\ufffd"):  # half a character
            return self._sent
        decoded = self._tokenizer.decode(self.tokens[-_ESCAPE_NEAR_END:], skip_special_tokens=True)
        if any(each in decoded for each in ("\x1b", "\x9b")):
            return self._sent
        held = max(
            (length for each in self._stop for length in range(1, len(each)) if text.endswith(each[:length])), default=0
        )
        text = text[: len(text) - held]
        return text if self._raw else text.rstrip()

    def _new(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new
