"""Splits a text of any script into words, for scores that count them.

Where a script puts spaces between words, a word is a run of letters, marks and digits; where it does not (Chinese, Japanese, Thai
and others), every character is a token of its own. Knows nothing of scores.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable

import regex

_UNSPACED = (
    "Han Hiragana Katakana Bopomofo Thai Lao Khmer Myanmar Yi "
    "Javanese Balinese Tai_Le New_Tai_Lue Tai_Tham Tai_Viet Nushu Tangut"
)
_UNSPACED_LETTER = "[[" + "".join(rf"\p{{scx={name}}}" for name in _UNSPACED.split()) + r"]&&\p{L}]"
_WORD = regex.compile(rf"(?V1){_UNSPACED_LETTER}\p{{M}}*|(?:(?!{_UNSPACED_LETTER})[\p{{L}}\p{{M}}\p{{N}}])+")
_PIECE = regex.compile(rf"(?V1){_UNSPACED_LETTER}\p{{M}}*|(?:(?!{_UNSPACED_LETTER})\S)+")
_INVISIBLE = regex.compile(
    r"[\p{Cf}\u0640]"
)  # joiners, soft hyphens, marks of direction; the stroke that widens Arabic words
_STEMMED = 4  # characters from which the rouge-score package stems
FOREIGN_SHARE = 0.02  # of words with letters beyond ASCII; with more, a text does not count as English


def words(text: str, *, stem: bool = False) -> list[str]:
    """Splits a text into words, or into characters where the script has no spaces.

    Compatibility forms (wide letters, ligatures) and upper and lower case count as the same.

    Args:
        text: of any script.
        stem: cut English words down to their stems (Porter 1980), as the rouge-score package does.
    """
    found = _WORD.findall(_folded(text))
    return [_stem(word) if len(word) >= _STEMMED and word.isascii() else word for word in found] if stem else found


def pieces(text: str) -> list[str]:
    """Splits a text at white space, and into characters where the script has no spaces; punctuation stays."""
    return _PIECE.findall(text.casefold())


def is_english(texts: Iterable[str]) -> bool:
    """Returns whether English stems fit the texts: at most `FOREIGN_SHARE` of their words have letters beyond ASCII."""
    found = [word for text in texts for word in words(text)]
    return sum(not word.isascii() for word in found) <= FOREIGN_SHARE * len(found)


def _folded(text: str) -> str:
    text = unicodedata.normalize("NFKC", text.replace("\u200b", " ")).casefold()
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))  # folding may take a character apart


@functools.lru_cache(maxsize=50_000)
def _stem(word: str) -> str:
    return _stemmer().tokenize(word)[0]


@functools.cache
def _stemmer():
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)
