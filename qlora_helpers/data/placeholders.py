"""Texts with columns in braces, such as `Classify.\\n\\n{subject}\\n{body}`: names alone, no attributes, indices or expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qlora_helpers.base.errors import DataError
from qlora_helpers.data.rows import listed

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[^{}]+|[{}]")


class Filled:
    """A text with columns in braces; `{{` and `}}` stand for braces of the text itself.

    Args:
        setting: the setting that holds it, for messages.
        text: the text.

    Attributes:
        columns: the names in braces, in their order.

    Raises:
        DataError: a brace stands alone, or no column is named.
    """

    def __init__(self, setting: str, text: str) -> None:
        self.setting, self.columns = setting, list[str]()
        self._pieces: list[tuple[str, str | None]] = []  # a text, or a column
        for found in _PIECE.finditer(text):
            if found[0] in ("{", "}"):
                raise DataError(
                    f"{setting} has a brace that stands alone, at character {found.start() + 1}",
                    expected="columns in braces, such as {label}",
                    next_step="Write {{ or }} for a brace of the text itself.",
                )
            if found[1] is not None:
                self.columns.append(found[1].strip())
                self._pieces.append(("", found[1].strip()))
            else:
                self._pieces.append(({"{{": "{", "}}": "}"}.get(found[0], found[0]), None))
        if not self.columns:
            raise DataError(
                f"{setting} names no column", expected="at least one in braces, such as {label}", got=repr(text[:80])
            )

    def check(self, source: str, found: Iterable[str]) -> None:
        """Checks that the columns are there.

        Raises:
            DataError: one is not; the message lists those that are.
        """
        missing = [column for column in dict.fromkeys(self.columns) if column not in set(found)]
        if missing:
            raise DataError(
                f"{source} has no column {' or '.join(map(repr, missing))}, which {self.setting} names",
                got=f"the columns {listed(found)}",
                next_step="Braces hold names of columns alone; write {{ or }} for a brace of the text itself.",
            )

    def fill(self, values: Mapping[str, Any], text_of: Callable[[Any, str], str]) -> tuple[str, tuple[int, int]]:
        """Returns the text with the columns' values, and where the first of them begins and the last one ends.

        Args:
            values: the row.
            text_of: turns a value and its column's name into a text.
        """
        parts: list[str] = []
        length, first, last = 0, -1, 0
        for text, column in self._pieces:
            part = text if column is None else text_of(values.get(column), column)
            if column is not None:
                first, last = length if first < 0 else first, length + len(part)
            parts.append(part)
            length += len(part)
        return "".join(parts), (first, last)
