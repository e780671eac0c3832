"""Licences and sizes of public data sets and models, known without opening them."""

from __future__ import annotations

from dataclasses import dataclass

DATA_LICENCES: dict[str, str] = {
    "embedded": "CC0-1.0",
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
