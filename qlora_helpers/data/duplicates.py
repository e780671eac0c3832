"""Keys by which rows that say the same are found: within a split, between splits, and between training and held-out rows."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection

from qlora_helpers.data.dialogues import SkippedRows
from qlora_helpers.data.examples import Example


def text_key(text: str) -> str:
    """A key that is the same for texts that differ only in white space."""
    return " ".join(text.split())


def words_key(text: str) -> str:
    """A key that is the same for copies of a text: a hash of its words, ignoring case, punctuation and white space."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return hashlib.sha256(" ".join(words or [text]).encode()).hexdigest()[:24]


def prompt_text(example: Example) -> str:
    """Everything that the model reads before the last answer, as one text; all of a document."""
    return "\n".join(message.content for message in example.messages[:-1]) or example.text


def prompt_key(example: Example) -> str:
    """The `words_key` of everything that the model reads before the last answer; of all of a document."""
    return words_key(prompt_text(example))


def is_known(example: Example, keys: Collection[str]) -> bool:
    """Whether a row's prompt is among `keys`; run folders of earlier versions hold keys of the dialogue without its instruction."""
    return prompt_key(example) in keys or words_key(example.prompt) in keys


def without_repeats(rows: list[Example], skipped: SkippedRows) -> list[Example]:
    """Keeps the first of several rows with the same prompt and answer, ignoring white space."""
    first: dict[tuple[str, str], str] = {}
    kept = []
    for row in rows:
        key = (text_key(prompt_text(row)), text_key(row.answer))
        if key in first:
            skipped.add(row.where, "a duplicate", f" of {first[key]}")
        else:
            first[key] = row.where
            kept.append(row)
    return kept
