"""How an answer ended: what the models hand over behind its text."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_helpers.serving.tool_calls import Call


@dataclass(frozen=True)
class Answered:
    """How an answer ended.

    Attributes:
        prompt_tokens, tokens: of the prompt and of the answer, the token that ended it included.
        finished: `stop`, `length` where the limit cut it, or `tool_calls`.
        calls: of tools, which the answer ended with.
    """

    prompt_tokens: int
    tokens: int
    finished: str
    calls: tuple[Call, ...] = ()
