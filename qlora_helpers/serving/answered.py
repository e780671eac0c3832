"""How an answer ended: what the models hand over behind its text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answered:
    """How an answer ended.

    Attributes:
        prompt_tokens, tokens: of the prompt and of the answer, the token that ended it included.
        finished: `stop`, or `length` where the limit cut it.
    """

    prompt_tokens: int
    tokens: int
    finished: str
