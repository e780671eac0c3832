"""In which scripts rows are written: Latin, Cyrillic, Chinese characters and so on, by the letters of a sample of rows.

A script is what can be counted without a model; a language can't. Knows nothing of files, tokens or models.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from qlora_helpers.data.examples import Example

SAMPLE_ROWS = 1000
SAMPLE_CHARACTERS = 2000  # of each row
KANA_SHARE = 0.05
"""Japanese is written with Chinese characters and kana; Chinese has no kana."""
_NAMES = {
    "CJK": "Chinese characters",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "HANGUL": "Korean",
    "FULLWIDTH": "Latin",
}
NONE = "no letters"


def script_of(example: Example) -> str:
    """Returns the script that most letters of a row's first characters are of."""
    text = (example.text or "\n".join(message.content for message in example.messages))[:SAMPLE_CHARACTERS]
    counts = Counter(filter(None, map(_script, text)))
    if not counts:
        return NONE
    letters = counts.total()
    if counts["Japanese"] >= KANA_SHARE * letters and counts["Japanese"] + counts["Chinese characters"] > letters / 2:
        return "Japanese"
    return counts.most_common(1)[0][0]


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    if not character.isalpha():
        return ""
    word = unicodedata.name(character, "").partition(" ")[0]
    return _NAMES.get(word, word.capitalize())


def counted(rows: Iterable[Example]) -> dict[str, int]:
    """Counts rows by script, the most frequent first."""
    return dict(Counter(map(script_of, rows)).most_common())


class ScriptSample:
    """Counts the scripts of an even sample of rows as they go by.

    Args:
        rows: the rows; only their number is taken.

    Attributes:
        counts: script -> rows of the sample.
    """

    def __init__(self, rows: Sequence[Example]) -> None:
        self._every = max(1, -(-len(rows) // SAMPLE_ROWS))
        self.counts: Counter[str] = Counter()

    def passing(self, rows: Iterable[Example]) -> Iterator[Example]:
        """Yields the rows."""
        for number, row in enumerate(rows):
            if number % self._every == 0:
                self.counts[script_of(row)] += 1
            yield row
