"""What a person asks and what comes back in pieces: the words that the answer panel and whatever answers it share.

Knows no model and no widgets; imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data.conversations import conversation as messages_of
from qlora_helpers.data.examples import Example, Message
from qlora_helpers.data.prompts import Prompt, question
from qlora_helpers.data.texts import Cleaner, Unusable


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with a question.

    Attributes:
        turns: questions and answers by turns, a question first and last.
        row: a row of the data that it begins with: the first question takes the place of the row's last one, and what stands before
            that is kept; None begins as the run's rows do.
    """

    turns: tuple[str, ...]
    row: Example | None = None

    @property
    def questions(self) -> int:
        """How many questions it has."""
        return (len(self.turns) + 1) // 2


@dataclass(frozen=True)
class Note:
    """What whoever answers is doing before it writes, such as loading the model."""

    text: str


@dataclass(frozen=True)
class Begun:
    """The prompt was read.

    Attributes:
        prompt_tokens: its length.
        trimmed: what was cut from it to fit, in a sentence; empty where nothing was.
        remark: what else a person should know of how it was asked.
    """

    prompt_tokens: int
    trimmed: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Ended:
    """The answer has ended.

    Attributes:
        tokens: of the answer, the one that ended it included.
        by_itself: False where it was cut off at its longest length.
    """

    tokens: int
    by_itself: bool


Piece = str | Note | Begun | Ended
ONE_QUESTION = "this run was trained on single questions; a further turn is outside what it was trained on"


def as_conversation(asked: str | Example | Conversation | Sequence[Mapping[str, Any]]) -> Conversation | Example:
    """Returns what a person asks in one of two forms: a conversation of texts, or a row that ends with an empty answer.

    Args:
        asked: a text; a row; a conversation; or messages as OpenAI writes them, of which the last is the user's.

    Raises:
        DataError: the messages are out of order, or end with an answer.
    """
    if isinstance(asked, str):
        return Conversation((asked,))
    if isinstance(asked, Example | Conversation):
        return asked
    try:
        listed = [dict(message) for message in asked]
        if not listed or listed[-1].get("role") == "assistant":
            raise Unusable("the last message is not a question")
        found, _ = messages_of([*listed, {"role": "assistant", "content": "-"}], Cleaner())
    except (Unusable, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            "these messages can't be asked",
            expected="a list of {role, content}, the user's last",
            got=str(error),
            next_step="Put them in order, or give a text.",
        ) from error
    return Example("asked", "asked", (*found[:-1], Message("assistant", "")))


def as_row(asked: Conversation | Example, config: DataConfig, like: Sequence[Example] = ()) -> Example:
    """Returns a conversation as a row whose last answer is to be given, in the words of a run's rows.

    A typed question gets the instruction and the system's message of the run's rows. Where these ask one question each, every
    question gets the instruction, as each was trained.

    Args:
        asked: a conversation, or a row as it is.
        config: the run's data settings.
        like: rows of the run.
    """
    if isinstance(asked, Example):
        return asked
    first = question(asked.turns[0], config, like) if asked.row is None else _with_question(asked.row, asked.turns[0])
    again = first.messages[_last_question(first)] if _asks_once(like) else Message("user", "")
    messages = list(first.messages[:-1])
    for number, text in enumerate(asked.turns[1:], start=1):
        if number % 2:
            messages.append(Message("assistant", text.rpartition("</think>")[2].strip()))
        else:
            messages.append(_with_body(again, text))
    return dataclasses.replace(first, messages=(*messages, first.messages[-1]), references=())


def remark_on(asked: Conversation | Example, like: Sequence[Example]) -> str:
    """Says where a conversation is longer than any that the run was trained on; empty where it is not."""
    several = isinstance(asked, Conversation) and asked.questions > 1
    return ONE_QUESTION if several and like and _asks_once(like) else ""


def _asks_once(like: Sequence[Example]) -> bool:
    return all(sum(message.role == "user" for message in row.messages) <= 1 for row in like)


def _with_question(row: Example, text: str) -> Example:
    """A row with another last question, and no answer yet."""
    place = _last_question(row)
    message = row.messages[place]
    if message.content[slice(*(message.body or (0, len(message.content))))] == text:
        return row
    changed = (*row.messages[:place], _with_body(message, text), *row.messages[place + 1 :])
    return dataclasses.replace(row, id="asked", messages=changed)


def _last_question(row: Example) -> int:
    return max(number for number, message in enumerate(row.messages[:-1]) if message.role == "user")


def _with_body(message: Message, text: str) -> Message:
    start, end = message.body or (0, len(message.content))
    body = None if message.body is None else (start, start + len(text))
    return dataclasses.replace(message, content=message.content[:start] + text + message.content[end:], body=body)


def trimmed_text(prompt: Prompt) -> str:
    """Says what was cut from a prompt, and where; empty where nothing was."""
    if not prompt.trimmed_tokens:
        return ""
    return f"{prompt.trimmed_tokens} tokens were cut at the {prompt.cut_at} of the text to fit: {prompt.shown}"
