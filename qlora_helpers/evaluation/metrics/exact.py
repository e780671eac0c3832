"""Scores of short answers: equal or not, and the F1 of their words. Rajpurkar et al. 2016 (arXiv:1606.05250). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_helpers.evaluation.metrics.labels import loosened
from qlora_helpers.evaluation.metrics.measures import Metric, Scored
from qlora_helpers.evaluation.metrics.text import best, overlap
from qlora_helpers.evaluation.metrics.words import words


def _score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scored]:
    return [_scored(answer, several) for answer, several in zip(answers, references, strict=True)]


def _scored(answer: str, references: Sequence[str]) -> Scored:
    given = words(answer)
    wanted = [found for found in map(words, references) if found]
    return {
        "exact_match": 100.0 * (loosened(answer) in {loosened(reference) for reference in references}),
        "token_f1": best(100 * overlap(given, found) for found in wanted),
    }


EXACT = Metric(
    "exact",
    "short answers",
    ("exact_match", "token_f1"),
    "exact_match",
    _score,
    ("An exact match ignores case, outer quotation marks and a final full stop.",),
)
