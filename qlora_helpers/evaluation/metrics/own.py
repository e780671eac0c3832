"""A metric that is the user's own Python function. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.text import brief
from qlora_helpers.evaluation.metrics.measures import USER, Metric, Scored
from qlora_helpers.evaluation.metrics.text import best

Function = Callable[[str, str], Any]
_EXPECTED = (
    "a function of an answer and a reference that returns a number, or a dict of numbers, of which higher is better"
)


def own_metric(function: Function, references: Sequence[str]) -> Metric:
    """The metric that a function of the user's is.

    It is tried on references, each as an answer to itself, before a model is asked anything. Where it fails on a model's answer
    later, that row has no score and the rest is kept.

    Args:
        function: of an answer and a reference; returns a number, true or false, a dict of them, or None for 'no score'.
        references: some, to try it on.

    Raises:
        UserError: it fails, or returns something else.
    """
    keys: dict[str, None] = {}
    name = getattr(function, "__name__", type(function).__name__).strip("<>")
    for reference in references:
        try:
            keys.update(dict.fromkeys(_values(function(reference, reference), name)))
        except Exception as error:  # the user's own code may raise anything
            raise UserError(
                f"the metric {name} fails on a reference as its own answer",
                expected=_EXPECTED,
                got=f"{type(error).__name__}: {brief(error)}",
                next_step="Correct it; no answer was made yet.",
            ) from error
    if not keys:
        raise UserError(f"the metric {name} gives no score", expected=_EXPECTED, next_step="Return a number.")

    def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scored]:
        return [_scored(function, name, keys, pair) for pair in zip(answers, references, strict=True)]

    return Metric(
        "function",
        "scored by a function of your own",
        tuple(keys),
        next(iter(keys)),
        score,
        (f"{name} is your own function; higher counts as better.",),
    )


def _scored(function: Function, name: str, keys: Mapping[str, None], pair: tuple[str, Sequence[str]]) -> Scored:
    answer, references = pair
    try:
        found = [_values(function(answer, reference), name) for reference in references]
    except Exception as error:  # answers took long to make: one that can't be scored doesn't cost the others
        return dict.fromkeys(keys) | {"score_error": f"{type(error).__name__}: {brief(error)}"}
    return {key: best(values.get(key) for values in found) for key in keys}


def _values(found: Any, name: str) -> dict[str, float | None]:
    if found is None:
        return {}
    named = found if isinstance(found, Mapping) else {name: found}
    return {f"{USER}{key}": None if value is None else _finite(value) for key, value in named.items()}


def _finite(value: Any) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value
