"""What is known of public data sets without opening them: licences and sizes."""

from __future__ import annotations

from dataclasses import dataclass

DATA_LICENCES: dict[str, str] = {
    "embedded": "CC0-1.0",
    "knkarthick/samsum": "CC BY-NC-ND 4.0",
    "knkarthick/dialogsum": "CC BY-NC-SA 4.0",
}


@dataclass(frozen=True)
class DataSize:
    """How much there is to train on in a known data set.

    Attributes:
        rows: of its training split.
        tokens_per_row: with the recipe's prompt, on average; SmolLM2's tokenizer.
    """

    rows: int
    tokens_per_row: float


DATA_SIZES: dict[str, DataSize] = {
    "embedded": DataSize(240, 226.7),
    "knkarthick/samsum": DataSize(14_732, 189.9),
    "knkarthick/dialogsum": DataSize(12_460, 262.4),
}


# Of dialogues with their summaries, prompt and names included: for files that are not tokenised yet
CHARACTERS_PER_TOKEN = 3.2
