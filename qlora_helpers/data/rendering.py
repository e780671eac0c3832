"""What a template makes of a row: a text, and in it the characters that are trained, each turn for itself.

A `Rendering` is what templates return and what the tokenizer takes. Knows nothing of tokens, chat templates or files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_helpers.data.examples import Example, Message

Span = tuple[int, int]
_OPEN, _CLOSE = "\U00100000", "\U00100001"  # private-use characters; no text of a row may hold them
PRIVATE = re.compile("[\U000f0000-\U000fffff\U00100000-\U0010ffff]")


class RowProblem(Exception):
    """A row can't be written by this template or tokenizer; the message is a reason that rows are counted by."""


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant in a rendering, which the model has to write after the prompt before it.

    Attributes:
        message: its place in the example's messages; 0 for a document.
        start, end: its characters in the text, from where the prompt ends to behind its end of turn.
    """

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Rendering:
    """A row as text.

    Attributes:
        text: the whole row, which is tokenised at once.
        turns: the turns that can be trained, in their order.
        masked: place in the messages -> why that turn can't be trained, for turns that should be.
        typed: characters of the text that read like control tokens and come from the row itself: they stay plain text.
        begin: whether the tokenizer's own begin-of-text token comes first (a chat template writes its own).
        notes: what a person should know about how rows are written.
    """

    text: str
    turns: tuple[Turn, ...] = ()
    masked: tuple[tuple[int, str], ...] = ()
    typed: tuple[Span, ...] = ()
    begin: bool = False
    notes: tuple[str, ...] = ()


class ControlTokens:
    """The strings of a tokenizer's control tokens, found in texts.

    Args:
        strings: the contents of the tokenizer's special tokens.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(sorted({each for each in strings if each}, key=lambda each: (-len(each), each)))
        self._hints = tuple(sorted({each[:2] for each in self.strings}))
        self._pattern = re.compile("|".join(map(re.escape, self.strings)) or "(?!)")
        self._marked = re.compile(f"{_OPEN}((?:{self._pattern.pattern}))?{_CLOSE}|[{_OPEN}{_CLOSE}]")

    def any_in(self, texts: Iterable[str]) -> bool:
        """Whether one of the texts holds the string of a control token; most texts are settled without a pattern."""
        for text in texts:
            for hint in self._hints:
                if hint in text:
                    if self._pattern.search(text):
                        return True
                    break
        return False

    def spans(self, text: str, start: int = 0, *, typed: Iterable[Span] = ()) -> list[Span]:
        """Returns where control tokens of the template's own are, from `start` on; `typed` are the row's own."""
        skip = set(typed)
        return [match.span() for match in self._pattern.finditer(text, start) if match.span() not in skip]

    def last_before(self, text: str, place: int, typed: Iterable[Span], window: int) -> Span | None:
        """Returns the last control token of the template's own that ends at or before `place`, if one is near."""
        skip = set(typed)
        found = None
        for match in self._pattern.finditer(text, max(0, place - window), place):
            if match.span() not in skip:
                found = match.span()
        return found

    def marked(self, text: str) -> str:
        """Puts marks around the control tokens that a row's own text reads like."""
        return self._pattern.sub(f"{_OPEN}\\g<0>{_CLOSE}", text)

    def unmarked(self, text: str) -> tuple[str, tuple[Span, ...]]:
        """Takes the marks out again and returns the text with the places of what stood in them."""
        pieces, typed, length, last = [], [], 0, 0
        for match in self._marked.finditer(text):
            pieces.append(text[last : match.start()])
            length += match.start() - last
            last = match.end()
            if word := match.group(1):
                pieces.append(word)
                typed.append((length, length + len(word)))
                length += len(word)
        pieces.append(text[last:])
        return "".join(pieces), tuple(typed)


def row_texts(example: Example) -> Iterator[str]:
    """Yields every text of a row that its source wrote."""
    if example.is_document:
        yield example.text
    for message in example.messages:
        yield message.content
        yield from (each for each in (message.thinking, message.name, message.tool_call_id) if each)
        if message.tool_calls:
            yield from _strings(message.tool_calls)
    if example.tools:
        yield from _strings(example.tools)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


class PlainText:
    """A text that is put together piece by piece, which knows where each piece is.

    Args:
        control: the tokenizer's control tokens: where a piece of the row's own reads like one, its place is kept.
    """

    def __init__(self, control: ControlTokens) -> None:
        self._control = control
        self._pieces: list[str] = []
        self.length = 0
        self.typed: list[Span] = []

    def add(self, text: str, *, own: bool = False) -> None:
        """Adds a piece; `own` says that the template, not the row, wrote it."""
        if not own and self._control.any_in([text]):
            self.typed += [(self.length + start, self.length + end) for start, end in self._control.spans(text)]
        self._pieces.append(text)
        self.length += len(text)

    def __str__(self) -> str:
        return "".join(self._pieces)


def written_calls(message: Message) -> str:
    """An assistant's calls of tools as plain text, one a line, behind its own text."""
    calls = [
        json.dumps({"name": call.get("name"), "arguments": call.get("arguments")}, ensure_ascii=False)
        for call in message.tool_calls
    ]
    return ("\n" if message.content and calls else "") + "\n".join(f"Call: {call}" for call in calls)
