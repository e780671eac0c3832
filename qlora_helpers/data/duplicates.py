"""Keys by which rows that say the same are found: within a split, between splits, and between training and held-out rows."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import unicodedata
from collections.abc import Collection
from typing import NamedTuple

from qlora_helpers.data.examples import Example
from qlora_helpers.data.rows import SkippedRows

_RUN = 30  # combining marks in a row that a letter has at most in any script; normalising a longer run takes its square
_LONG_RUN = re.compile(rf"[^\w\s]{{{_RUN + 1}}}")
_WORD = re.compile(r"\w")
_SPACED = bytes(32 if code < 128 and not _WORD.match(chr(code)) else code for code in range(256))


def text_key(text: str) -> bytes:
    """A key that is the same for texts that differ only in white space: a hash, so that no text is held twice."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def words_key(text: str) -> str:
    """A key that is the same for copies of a text: a hash of its words, ignoring case, punctuation and white space."""
    plain = text
    if not text.isascii():
        if any(map(unicodedata.combining, set(text))) and _LONG_RUN.search(text):
            plain = _marks().sub(r"\1", text)
        plain = unicodedata.normalize("NFKC", plain)
    folded = plain.casefold()
    if not folded.isascii():
        for char in set(folded):
            if char > "\x7f" and not _WORD.match(char):
                folded = folded.replace(char, " ")
    # Byte by byte, which is several times as fast as a pattern for what stands between words
    words = b" ".join(folded.encode("utf-8", "surrogatepass").translate(_SPACED).split())
    return hashlib.sha256(words or text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


@functools.cache
def _marks() -> re.Pattern[str]:
    """Matches combining marks beyond the first `_RUN` of a run (Unicode Standard Annex 15, section 13: Stream-Safe Text)."""
    marks = "".join(re.escape(char) for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.combining(char))
    return re.compile(f"([{marks}]{{{_RUN}}})[{marks}]+")


def prompt_text(example: Example) -> str:
    """Everything that the model reads before the last answer, as one text; all of a document."""
    return "\n".join(message.content for message in example.messages[:-1]) or example.text


def prompt_key(example: Example) -> str:
    """The `words_key` of everything that the model reads before the last answer; of all of a document."""
    return words_key(prompt_text(example))


def is_known(example: Example, keys: Collection[str]) -> bool:
    """Whether a row's prompt is among `keys`; run folders of earlier versions hold keys of the dialogue without its instruction."""
    return prompt_key(example) in keys or words_key(example.prompt) in keys


class RowKey(NamedTuple):
    """What is held of a row while splits are made: its number and place, and hashes of its prompt, and of it with its answer."""

    number: int
    where: str
    prompt: bytes
    whole: bytes


def row_key(number: int, example: Example) -> RowKey:
    """Returns the keys of a row; white space counts for nothing."""
    prompt = text_key(prompt_text(example))
    answer = text_key(example.answer)
    return RowKey(number, example.where, prompt, hashlib.blake2b(prompt + answer, digest_size=16).digest())


def without_repeats(rows: list[RowKey], skipped: SkippedRows) -> list[RowKey]:
    """Keeps the first of several rows with the same prompt and answer, ignoring white space."""
    first: dict[bytes, str] = {}
    kept = []
    for row in rows:
        if row.whole in first:
            skipped.add(row.where, "a duplicate", f" of {first[row.whole]}")
        else:
            first[row.whole] = row.where
            kept.append(row)
    return kept
