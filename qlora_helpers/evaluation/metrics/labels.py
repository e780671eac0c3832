"""Scores of answers that are one of a few labels: accuracy, macro-F1, and which label is taken for which.

An answer counts as a label if it is one of the known ones, ignoring case, outer quotation marks and a final full stop; a sentence
that contains a label is not a label. Imports no torch.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_helpers.base.tables import Table
from qlora_helpers.evaluation.metrics.measures import Metric, Scored

NO_LABEL = "(no label)"
MOST_SHOWN = 20  # labels of a confusion table


def loosened(text: str) -> str:
    """A label without what models add to one: outer white space and quotation marks, a final full stop, upper case."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("\"'`*\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb ").rstrip(".\u3002 ")


class Labels:
    """The labels that are known, and which of them an answer is.

    Args:
        texts: labels, repeats included; two that differ only in what `loosened` ignores stay two.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.exact = {text.strip() for text in texts}
        alike = Counter(loosened(label) for label in self.exact)
        self._loose = {loosened(label): label for label in self.exact if alike[loosened(label)] == 1}

    def label(self, answer: str) -> str:
        """The label that an answer is, or an empty text."""
        answer = answer.strip()
        return answer if answer in self.exact else self._loose.get(loosened(answer), "")


def labels_metric(known: Iterable[str] = ()) -> Metric:
    """The metric for labels.

    Args:
        known: labels of the training answers; those of the references are known too.
    """
    known = tuple(known)

    def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scored]:
        labels = Labels([*known, *(text for several in references for text in several)])
        return [_scored(labels, answer, several) for answer, several in zip(answers, references, strict=True)]

    return Metric(
        "labels",
        "labels, one of a few",
        ("macro_f1", "accuracy", "is_label"),
        "macro_f1",
        score,
        (
            "macro-F1 is the mean of the F1 of each label that the held-out rows expect, so rare labels count as much as others.",
        ),
    )


def _scored(labels: Labels, answer: str, references: Sequence[str]) -> Scored:
    predicted, expected = labels.label(answer), [reference.strip() for reference in references]
    right = bool(predicted) and predicted in expected
    return {
        "expected": predicted if right else expected[0],
        "predicted": predicted,
        "correct": 100.0 * right,
        "is_label": 100.0 * bool(predicted),
    }


def confusion(answers: Sequence[Mapping[str, Any]], *, caption: str = "") -> Table:
    """Returns how often each expected label (a row) was answered by which label (a column)."""
    pairs = Counter((answer["expected"], answer["predicted"]) for answer in answers if "predicted" in answer)
    counts = Counter[str]()
    for (expected, _), count in pairs.items():
        counts[expected] += count
    shown = [label for label, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_SHOWN]]
    others = sorted({predicted for _, predicted in pairs} - set(shown) - {""})
    lines = []
    for expected in shown:
        row = [pairs[expected, predicted] for predicted in shown]
        rest = sum(pairs[expected, predicted] for predicted in others)
        lines.append([expected, *row, *([rest] if others else []), pairs[expected, ""]])
    header = ["expected", *shown, *(["another"] if others else []), NO_LABEL]
    hidden = len(counts) - len(shown)
    notes = [f"The {MOST_SHOWN} most frequent of {len(counts)} labels are shown."] if hidden > 0 else []
    return Table(header, lines, caption=caption, notes=notes, numbers=range(1, len(header)))
