"""What a measure is: its name, its unit, which direction is better, and its value over any sample of the rows.

An answer is a mapping of plain values, as `evaluation.json` holds it. A measure takes from each answer a few numbers that can be
summed over rows (`parts`) and computes its value from the sums (`total`), so a bootstrap sample of a macro-F1 is as simple as one
of a mean. Imports no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Answers = Sequence[Mapping[str, Any]]
Scored = dict[str, Any]
USER = "user_"  # what the keys of a user's own measures begin with


@dataclass(frozen=True)
class Measure:
    """One figure of a model over rows.

    Attributes:
        key: its name in `evaluation.json`.
        name: its name in tables.
        unit: `%`, `points`, `nats`, `tokens`, or nothing.
        higher_is_better: None where higher is neither better nor worse.
        parts: `(rows, n)` from the answers; a row with NaN does not have the measure.
        total: `(samples,)` from the parts' sums, `(samples, n)`.
        row: the key of the value that says which of two answers to a row is the better one.
    """

    key: str
    name: str
    unit: str
    higher_is_better: bool | None
    parts: Callable[[Answers], np.ndarray]
    total: Callable[[np.ndarray], np.ndarray]
    row: str

    @property
    def label(self) -> str:
        """The name with its unit where that is not said by the name."""
        return f"{self.name}, %" if self.unit == "%" else self.name

    def of(self, answers: Answers) -> float | None:
        """The measure over all answers, or None where none has it."""
        parts = self.parts(answers) if answers else np.empty((0, 1))
        parts = parts[~np.isnan(parts).any(axis=1)]
        if not len(parts):
            return None
        value = float(self.total(parts.sum(axis=0, keepdims=True))[0])
        return value if np.isfinite(value) else None


def quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """`above / below`, and NaN where `below` is zero."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)


def number(answer: Mapping[str, Any], key: str, scale: float = 1.0) -> float:
    """An answer's value as a number, NaN where it has none."""
    value = answer.get(key)
    return float("nan") if value is None else scale * float(value)


def mean(key: str, name: str, unit: str, *, higher: bool | None = True, scale: float = 1.0, value: str = "") -> Measure:
    """A measure that is the mean of a value over rows."""
    source = value or key

    def parts(answers: Answers) -> np.ndarray:
        return np.array([(number(answer, source, scale), 1.0) for answer in answers])

    return Measure(key, name, unit, higher, parts, lambda sums: quotient(sums[:, 0], sums[:, 1]), source)


def _losses(answers: Answers) -> np.ndarray:
    return np.array([(number(answer, "nats"), float(answer.get("loss_tokens") or 0)) for answer in answers])


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(quotient(sums[:, 0], sums[:, 1]), 50.0))


def _field_counts(answers: Answers) -> np.ndarray:
    return np.array(
        [
            (2 * number(answer, "fields_right"), number(answer, "fields_given") + number(answer, "fields_wanted"))
            for answer in answers
        ]
    )


def label_counts(answers: Answers) -> np.ndarray:
    """For each label that some row expects: rows that got it right, rows that were given it, rows that expect it."""
    labels = {label: index for index, label in enumerate(sorted({a["expected"] for a in answers if a.get("expected")}))}
    counts = np.zeros((len(answers), 3 * max(1, len(labels))))
    for row, answer in zip(counts, answers, strict=True):
        expected, predicted = labels.get(answer.get("expected", "")), labels.get(answer.get("predicted", ""))
        if expected is None:
            row[:] = np.nan
            continue
        row[3 * expected + 2] = 1
        if predicted is not None:
            row[3 * predicted + 1] = 1
            row[3 * expected] = predicted == expected
    return counts


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    right, given, wanted = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
    scores = np.where(wanted > 0, 2 * right / np.maximum(1, given + wanted), 0)
    return 100 * quotient(scores.sum(axis=1), (wanted > 0).sum(axis=1).astype(float))


MEASURES = {
    item.key: item
    for item in (
        mean("rouge1", "ROUGE-1", "points"),
        mean("rouge2", "ROUGE-2", "points"),
        mean("rouge_l", "ROUGE-L", "points"),
        mean("chrf", "chrF", "points"),
        Measure("macro_f1", "macro-F1", "points", True, label_counts, _macro_f1, "correct"),
        mean("accuracy", "accuracy", "%", value="correct"),
        mean("is_label", "is a label", "%"),
        Measure(
            "field_f1",
            "field F1",
            "points",
            True,
            _field_counts,
            lambda sums: 100 * quotient(sums[:, 0], sums[:, 1]),
            "row_field_f1",
        ),
        mean("all_fields", "all fields right", "%"),
        mean("keys", "right keys", "%"),
        mean("valid_json", "valid JSON", "%"),
        mean("fits_schema", "fits the schema", "%"),
        mean("exact_match", "exact match", "%"),
        mean("token_f1", "token F1", "points"),
        mean("number_right", "right number", "%"),
        mean("absolute_error", "mean absolute error", "", higher=False),
        mean("is_number", "is a number", "%"),
        Measure("loss", "loss", "nats", False, _losses, lambda sums: quotient(sums[:, 0], sums[:, 1]), "nats"),
        Measure("perplexity", "perplexity", "", False, _losses, _perplexity, "nats"),
        mean("stop_rate", "stops", "%", scale=100, value="stopped"),
        mean("repetition", "repeated", "%", higher=False, scale=100),
        mean("tokens", "tokens", "tokens", higher=None),
    )
}
"""Every measure that the package knows, in the order of the tables."""
COMMON = ("loss", "perplexity", "stop_rate", "repetition", "tokens")
"""The measures of every task, which stand behind its own."""


@functools.cache
def measure_of(key: str) -> Measure:
    """Returns the measure of a key; an unknown one is a user's own, of which higher is better."""
    return MEASURES.get(key) or mean(key, key.removeprefix(USER), "")


@dataclass(frozen=True)
class Metric:
    """How the answers of one kind of task are scored.

    Attributes:
        name: as `evaluation.metric` names it.
        task: what the task is, in words that follow 'The answers are'.
        measures: keys of its measures, in the table's order.
        main: the measure that counts.
        score: values for each answer, from the answers and the references of each; of several references the best counts.
        notes: what a person should know about how it counts.
    """

    name: str
    task: str
    measures: tuple[str, ...]
    main: str
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], list[Scored]]
    notes: tuple[str, ...] = ()
