"""Licences and sizes of public data sets and models, known without opening them."""

from __future__ import annotations

import re
from dataclasses import dataclass

DATA_LICENCES: dict[str, str] = {
    "embedded": "CC0-1.0",
    "embedded:tickets": "CC0-1.0",
    "knkarthick/samsum": "CC BY-NC-ND 4.0",
    "knkarthick/dialogsum": "CC BY-NC-SA 4.0",
}


@dataclass(frozen=True)
class DataSize:
    """The size of a known data set.

    Attributes:
        rows: rows of its training split.
        tokens_per_row: mean over rows, with the recipe's prompt and SmolLM2's tokenizer.
    """

    rows: int
    tokens_per_row: float


DATA_SIZES: dict[str, DataSize] = {
    "embedded": DataSize(240, 226.7),
    "knkarthick/samsum": DataSize(14_732, 189.9),
    "knkarthick/dialogsum": DataSize(12_460, 262.4),
}


# Of dialogues with their summaries, including prompt and names: estimates files that are not tokenised yet
CHARACTERS_PER_TOKEN = 3.2
# The same of other scripts, counted with SmolLM2's tokenizer on a few sentences in each: Chinese, Japanese, Korean and Thai 0.5,
# Hindi and Hebrew 0.9, Arabic 1.0, Greek and Russian 1.2. Larger vocabularies need fewer tokens.
OTHER_SCRIPTS = (
    ("\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff", 0.53),
    ("\u0e00-\u0eff\U0001f000-\U0001ffff", 0.5),
    ("\u0590-\u05ff\u0600-\u06ff\u0900-\u0dff", 0.93),
    ("\u0370-\u052f", 1.2),
)


def estimated_tokens(text: str) -> float:
    """Estimates a text's tokens by its scripts, without a tokenizer."""
    if text.isascii():
        return len(text) / CHARACTERS_PER_TOKEN
    rest, tokens = len(text), 0.0
    for characters, per_token in _SCRIPTS:
        count = sum(map(len, characters.findall(text)))
        rest, tokens = rest - count, tokens + count / per_token
    return tokens + rest / CHARACTERS_PER_TOKEN


_SCRIPTS = tuple((re.compile(f"[{characters}]+"), per_token) for characters, per_token in OTHER_SCRIPTS)
