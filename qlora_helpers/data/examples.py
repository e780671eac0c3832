"""The shape that every row has once it is read: an `Example`, a conversation or a document, with what is to be learned marked.

A dialogue with its summary, a question with its answer, a ticket with its label, a chat of many turns and a page of prose are all
examples; everything after the reading (labels, packing, evaluation, widgets, report) speaks of examples alone. Knows nothing of
files, tokens, templates or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: its text; may be empty for an assistant who only calls tools.
        thinking: what a reasoning model thought before it answered; not part of `content`.
        tool_calls: of an assistant, each `{"name": ..., "arguments": {...}}`, with an `id` where the source has one.
        tool_call_id, name: of a tool's result: which call it answers, and the tool's name.
        learned: whether an assistant's turn is trained (OpenAI's `weight: 0` says no); other roles are never trained.
        body: `(start, end)` in `content`, the characters that may be cut where a row is too long; None means all of them. An
            instruction that stands before the row's own text is outside it.
    """

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str = ""
    name: str = ""
    learned: bool = True
    body: tuple[int, int] | None = None


@dataclass(frozen=True)
class Example:
    """One row: a conversation that ends with the assistant's turn, or a document.

    Attributes:
        id: a name that is unique in its corpus.
        where: the place it came from, as in `rows.jsonl line 12`.
        messages: the turns, oldest first; empty for a document.
        text: the document, of which every token is learned; empty for a conversation.
        tools: descriptions of the functions that the assistant may call (JSON schemas, as chat templates take them).
        references: further right answers; they are never trained, an answer is scored against each, and the best score counts.
    """

    id: str
    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    references: tuple[str, ...] = ()

    @property
    def is_document(self) -> bool:
        """Whether the row is plain text rather than a conversation."""
        return not self.messages

    @property
    def answer(self) -> str:
        """The assistant's last turn, which the model is asked for when it is evaluated; empty for a document."""
        return self.messages[-1].content if self.messages else ""

    @property
    def prompt(self) -> str:
        """What the person brought, for people to read: the last user's text that may be cut; for a document, its text."""
        for message in reversed(self.messages):
            if message.role == "user":
                return message.content if message.body is None else message.content[slice(*message.body)]
        return self.text
