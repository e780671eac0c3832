"""Scores of answers that are numbers: right within a tolerance, and how far off. Imports no torch."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import regex

from qlora_helpers.evaluation.metrics.measures import Metric, Scored

ROUNDING = 1e-9  # share of the reference by which two ways to write a number may differ
LONGEST_EXACT_DIGITS = 15  # a float holds no more
LARGEST = 1e100  # beyond it, errors and their sums would leave the range of a float
_SIGNS = r"\s*+([+-]?)\s*+\p{Sc}?\s*+"  # possessive: a long run of white space is read once
_PATTERNS = {
    decimal: regex.compile(
        rf"{_SIGNS}((?:\d{{1,3}}(?:(?P<group>[{group} '\u2019_])\d{{3}})(?:(?P=group)\d{{3}})*|\d+)?(?:{re.escape(decimal)}\d+)?"
        rf"(?:[eE][+-]?\d+)?)\s*+(?:\p{{Sc}}|%)?\.?\s*+"
    )
    for decimal, group in ((".", ","), (",", "."))
}


def number_of(text: str, decimal: str = ".") -> float | None:
    """The number that a text is, or None where it is something else or more than a number.

    A currency sign, a percent sign, groups of three digits and a final full stop may stand with it.

    Args:
        text: such as `1,234.5`, `$12`, `−3 %`.
        decimal: the sign before the decimals, `.` or `,`.
    """
    found = _PATTERNS[decimal].fullmatch(unicodedata.normalize("NFKC", text).replace("\u2212", "-"))
    if found is None or not any(char.isdecimal() for char in found[2]):
        return None
    digits = found[2] if found["group"] is None else found[2].replace(found["group"], "")
    try:
        value = float(found[1] + digits.replace(",", "."))
    except ValueError:  # an exponent alone
        return None
    return value if abs(value) <= LARGEST else None


def decimal_sign(texts: Iterable[str]) -> str | None:
    """The decimal sign under which all texts are numbers, the full stop if both do; None where neither does."""
    texts = list(texts)
    return next((sign for sign in _PATTERNS if all(number_of(text, sign) is not None for text in texts)), None)


def is_identifier(text: str) -> bool:
    """Whether digits name something rather than count: a leading zero as in a postcode, or more digits than a float holds."""
    digits = "".join(char for char in text if char.isdecimal())
    return regex.match(r"\s*0\d", text) is not None or len(digits.lstrip("0")) > LONGEST_EXACT_DIGITS


def numbers_metric(tolerance: float = 0.0, decimal: str = ".") -> Metric:
    """The metric for numbers.

    Args:
        tolerance: by which share of the reference a right answer may be off.
        decimal: the sign before the decimals, in references and answers.
    """

    def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scored]:
        return [
            _scored(number_of(answer, decimal), [number_of(reference, decimal) for reference in several], tolerance)
            for answer, several in zip(answers, references, strict=True)
        ]

    within = f"within {tolerance:.3g} times the reference" if tolerance else "if it equals the reference"
    return Metric(
        "numbers",
        "numbers",
        ("number_right", "absolute_error", "is_number"),
        "number_right",
        score,
        (f"A number is right {within}; the mean absolute error leaves out answers that are not a number.",),
    )


def _scored(given: float | None, references: Sequence[float | None], tolerance: float) -> Scored:
    wanted = [reference for reference in references if reference is not None]
    if not wanted:
        return {"number_right": None, "absolute_error": None, "is_number": 100.0 * (given is not None)}
    if given is None:
        return {"number_right": 0.0, "absolute_error": None, "is_number": 0.0}
    errors = [(abs(given - reference), max(tolerance, ROUNDING) * abs(reference)) for reference in wanted]
    return {
        "number_right": 100.0 * any(error <= limit for error, limit in errors),
        "absolute_error": min(error for error, _ in errors),
        "is_number": 100.0,
    }
