"""Scores of free text in any language: ROUGE and chrF, and how much of an answer repeats itself.

ROUGE: Lin 2004 (aclanthology.org/W04-1013), with the arithmetic of the rouge-score package, whose figures for English text it
reproduces exactly. chrF: Popović 2015 (aclanthology.org/W15-3049), by sacrebleu. Imports no torch.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

from qlora_helpers.evaluation.metrics.measures import Metric, Scored
from qlora_helpers.evaluation.metrics.words import is_english, pieces, words

REPEATED_WORDS = 4


def f_measure(right: int, given: int, wanted: int) -> float:
    """The harmonic mean of `right / given` and `right / wanted`, 0 to 1."""
    precision, recall = right / max(given, 1), right / max(wanted, 1)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def overlap(given: Sequence[object], wanted: Sequence[object]) -> float:
    """The F-measure of two lists whose order does not count, 0 to 1."""
    right = (Counter(given) & Counter(wanted)).total()
    return f_measure(right, len(given), len(wanted))


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, a bit for each token (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    everything = (1 << len(one)) - 1
    row = everything
    for word in other:
        found = row & places.get(word, 0)
        row = ((row + found) | (row - found)) & everything
    return len(one) - row.bit_count()


def rouge(answer: Sequence[str], reference: Sequence[str]) -> dict[str, float | None]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures of two lists of words, 0 to 100; None where the reference has none to count."""
    pairs = [list(zip(text, text[1:], strict=False)) for text in (answer, reference)]
    longest = f_measure(common_length(answer, reference), len(answer), len(reference))
    return {
        "rouge1": 100 * overlap(answer, reference) if reference else None,
        "rouge2": 100 * overlap(*pairs) if len(reference) > 1 else None,
        "rouge_l": 100 * longest if reference else None,
    }


def rouge_rows(
    answers: Sequence[str], references: Sequence[Sequence[str]], *, stem: bool | None = None
) -> list[dict[str, float | None]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of each answer, 0 to 100; of several references the best counts for each measure.

    Args:
        answers: a text for each row.
        references: of each row.
        stem: compare the stems of English words; None does so where the references are English.

    Returns:
        The three values for each row; None where no reference has a word (for ROUGE-2, two words), such as an emoji.
    """
    if stem is None:
        stem = is_english(text for several in references for text in several)
    rows = []
    for answer, several in zip(answers, references, strict=True):
        given = words(answer, stem=stem)
        found = [rouge(given, words(reference, stem=stem)) for reference in several]
        rows.append({key: best(one[key] for one in found) for key in ("rouge1", "rouge2", "rouge_l")})
    return rows


def best(values) -> float | None:
    """The largest of several values that may be None."""
    return max((value for value in values if value is not None), default=None)


@functools.cache
def _chrf():
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def chrf(answer: str, references: Sequence[str]) -> float | None:
    """chrF2 of an answer, 0 to 100; None where no reference has a visible character."""
    usable = [reference for reference in references if reference.strip()]
    return float(_chrf().sentence_score(answer, usable).score) if usable else None


def repetition(text: str) -> float:
    """The share of an answer's runs of four words that occurred in it before, 0 to 1.

    The seq-rep-4 of Welleck et al. 2019 (arXiv:1908.04319), over words, or over characters where a script has no spaces.
    """
    found = pieces(text)
    runs = [tuple(found[index : index + REPEATED_WORDS]) for index in range(len(found) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scored]:
    rows = rouge_rows(answers, references)
    return [
        row | {"chrf": chrf(answer, several)} for row, answer, several in zip(rows, answers, references, strict=True)
    ]


TEXT = Metric(
    "text",
    "free text",
    ("rouge1", "rouge2", "rouge_l", "chrf"),
    "rouge_l",
    _score,
    ("ROUGE counts shared words (characters in scripts without spaces), chrF shared strings of characters.",),
)
