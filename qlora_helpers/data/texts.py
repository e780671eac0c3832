"""Turns the cells of a source into clean texts, or says why a cell holds none.

Line ends become \\n; control characters, overrides of the writing direction and byte order marks are removed and counted. Knows
nothing of columns, rows and files.
"""

from __future__ import annotations

import datetime
import decimal
import math
import re
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.text import CONTROLS, SURROGATES

MISSING = frozenset({"nan", "NaN", "NAN", "NaT", "<NA>", "#N/A", "\\N"})
"""What programs write where a value is missing; as a whole cell it is no text."""
DOUBTFUL = frozenset({"none", "null", "n/a", "na", "undefined"})
"""What may be a label or a missing value: taken as text, and counted in a note."""
_REMOVED = re.compile(CONTROLS.pattern[:-1] + "\ufeff]")
_UNSEEN = (
    "\\s\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff"
    "\uffa0\U000e0000-\U000e0fff"
)
_SEEN = re.compile(f"[^{_UNSEEN}]")
_NUMBERS = (bool, int, float, decimal.Decimal)


class Unusable(ValueError):
    """A row that can't be used.

    Attributes:
        kind: a reason that rows are counted by.
        detail: what else is known of this row.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind + detail)
        self.kind, self.detail = kind, detail


class Cleaner:
    """Cleans texts, and counts what it removed.

    Attributes:
        removed: control characters that were removed.
        touched: rows that they were removed from, counted by who hands over the rows.
        doubtful: how often each of `DOUBTFUL` was a whole answer.
        empty_systems: system messages without a text, which are left out.
        roles: unusual names of who speaks, and what each was taken for.
        objects: answers that were objects and are written as JSON.
    """

    def __init__(self) -> None:
        self.removed = self.touched = self.empty_systems = self.objects = 0
        self.roles: dict[str, str] = {}
        self.doubtful: dict[str, int] = {}

    def text(self, value: Any, what: str, *, numbers: bool = False) -> str:
        """Returns a cell's text.

        Args:
            value: the cell. A list of texts is taken as lines; text parts as OpenAI's (`{"type": "text", "text": ...}`) are joined.
            what: the cell's part in the row, for messages, such as `answer`.
            numbers: whether numbers, booleans and dates are taken as text, as in labels.

        Raises:
            Unusable: it is missing, empty, or holds no text.
        """
        text = self.optional(value, what, numbers=numbers)
        if not text:
            raise Unusable(f"its {what} is {'missing' if value is None else 'empty'}")
        return text

    def optional(self, value: Any, what: str, *, numbers: bool = False) -> str:
        """Returns a cell's text as `text` does, and an empty one where it is missing or empty.

        Raises:
            Unusable: it holds something that is not text.
        """
        if not isinstance(value, str):
            value = _as_text(value, what, numbers)
        if "\r" in value:
            value = value.replace("\r\n", "\n").replace("\r", "\n")
        value, removed = _REMOVED.subn("", value)
        self.removed += removed
        if not value.isascii() and SURROGATES.search(value):  # half an emoji: no tokenizer takes it
            raise Unusable(f"its {what} holds half a character (an unpaired surrogate)")
        if len(value) <= 5 and value.strip() in MISSING:
            raise Unusable(f"its {what} is {value.strip()!r}, which stands for a missing value")
        return value if _SEEN.search(value) else ""

    def answer(self, value: Any, what: str = "answer") -> str:
        """Returns an answer's text: numbers and booleans are taken as text, and doubtful words are counted.

        Raises:
            Unusable: as for `text`.
        """
        text = self.text(value, what, numbers=True)
        if len(text) <= 9 and text.strip().lower() in DOUBTFUL:
            self.doubtful[text.strip()] = self.doubtful.get(text.strip(), 0) + 1
        return text

    def notes(self, name: str) -> list[str]:
        """Returns a line on the characters that were removed, and one on words that may mean a missing value."""
        found = []
        if self.removed:
            found.append(f"{name}: removed {self.removed} control characters (rows touched: {self.touched})")
        if self.empty_systems:
            found.append(f"{name}: left out {self.empty_systems} system messages that are empty")
        if self.roles:
            words = ", ".join(f"{said!r} as {role}" for said, role in sorted(self.roles.items()))
            found.append(f"{name}: who speaks was taken by its name: {words}")
        if self.objects:
            found.append(f"{name}: answers that are objects, written as JSON: {self.objects}")
        if self.doubtful:
            words = ", ".join(f"{count} x {word!r}" for word, count in self.doubtful.items())
            found.append(f"{name}: taken as answers, though they may stand for missing values: {words}")
        return found


_PART_KEYS = {"type", "text", "annotations", "cache_control", "citations"}


@dataclass(frozen=True)
class Unreadable:
    """A cell that holds something which can't be read; a row that needs it is left out.

    Attributes:
        what: it in words, for messages.
    """

    what: str


class KeyTwiceError(ValueError):
    """An object has a key twice, of which JSON's readers would take the last without a word."""


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of its keys and values, for `json`'s `object_pairs_hook`.

    Raises:
        KeyTwiceError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyTwiceError(next(key for key in found if keys.count(key) > 1)[:80])
    return found


def _as_text(value: Any, what: str, numbers: bool) -> str:
    if value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value)):
        return ""
    if isinstance(value, float) and math.isinf(value):
        raise Unusable(f"its {what} is an infinite number")
    if numbers and isinstance(value, _NUMBERS):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if numbers and isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list | tuple) and value:
        if all(isinstance(item, str) for item in value):
            return "\n".join(value)
        if all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in value):
            kinds = {item.get("type", "text") for item in value}
            keys = {key for item in value for key, more in item.items() if more not in (None, [])}
            if kinds <= {"text", "input_text", "output_text"} and keys <= _PART_KEYS:  # else something would be lost
                return "".join(item["text"] for item in value)
    if isinstance(value, list | tuple) and not value:
        return ""
    raise Unusable(f"its {what} is not text", f" but {_kind(value)}")


def _kind(value: Any) -> str:
    if isinstance(value, Unreadable):
        return value.what
    if isinstance(value, list | tuple):
        parts = [part.get("type") for part in value if isinstance(part, dict)]
        other = next((part for part in parts if isinstance(part, str) and "text" not in part), None)
        return f"list with a part of type {other[:40]!r}" if other else "list"
    if isinstance(value, dict):
        return f"an object with {', '.join(repr(str(key)[:40]) for key in list(value)[:5]) or 'nothing'}"
    return type(value).__name__
