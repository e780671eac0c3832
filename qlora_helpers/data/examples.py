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
SUMMARIZE = "Summarize the chat dialogue:\n"  # the instruction of the 2023 recipe


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

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the values of a row as run folders hold them, those of a dialogue with its summary under today's names."""
        if "dialogue" not in values or "summary" not in values:
            return values
        dialogue, summary = values["dialogue"], values["summary"]
        if not isinstance(dialogue, str) or not isinstance(summary, str):
            raise ValueError("expected the texts dialogue and summary")
        kept = {name: values[name] for name in ("id", "where", "references") if name in values}
        asked = {"role": "user", "content": SUMMARIZE + dialogue, "body": [len(SUMMARIZE), len(SUMMARIZE + dialogue)]}
        return kept | {"messages": [asked, {"role": "assistant", "content": summary}]}


def characters_of(example: Example) -> int:
    """Counts the characters of a row's texts."""
    return len(example.text) + sum(len(message.content) + len(message.thinking) for message in example.messages)


def one_turn(
    row_id: str,
    where: str,
    body: str,
    answer: str,
    *,
    instruction: str = "",
    system: str = "",
    references: tuple[str, ...] = (),
) -> Example:
    """Returns a row with one question and one answer.

    Args:
        row_id, where: the row's name, and the place it came from.
        body: the row's own text, which may be cut where the row is too long.
        answer: what is to be learned.
        instruction: stands before the body, white space at its end included.
        system: the system's message; none is made of an empty text.
        references: further right answers.
    """
    first = (Message("system", system),) if system else ()
    asked = Message("user", instruction + body, body=(len(instruction), len(instruction) + len(body)))
    return Example(row_id, where, (*first, asked, Message("assistant", answer)), references=references)
