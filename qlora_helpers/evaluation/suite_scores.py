"""Reads what lm-eval measured of two models, and pairs their rows for an interval of the difference. Imports no lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_helpers.evaluation.scorecard import FEWEST_ROWS, LEVEL, resamples
from qlora_helpers.evaluation.suite_file import TaskScore


def scores_of(
    base: Mapping[str, Any], tuned: Mapping[str, Any], *, limit: int | None = None, chat: bool = False
) -> list[TaskScore]:
    """Reads the results of two evaluations by lm-eval of the same tasks.

    Args:
        base, tuned: what `lm_eval.simple_evaluate` returned for each model, `samples` included where there are any.
        limit, chat: as for `suite.ask_tasks`.

    Returns:
        A score for each measure of each task and group that both have.
    """
    scores = []
    for task, values in tuned["results"].items():
        before = base["results"].get(task, {})
        higher = tuned.get("higher_is_better", {}).get(task) or {}
        rows = (tuned.get("n-samples", {}).get(task) or {}).get("effective", 0)
        for key, value in values.items():
            name, _, kept = key.partition(",")
            if name.endswith("_stderr") or not kept or not all(map(_is_number, (value, before.get(key)))):
                continue
            pairs = _pairs(base, tuned, task, name, kept)
            low, high = _interval(*pairs, float(before[key]), float(value)) or (None, None)
            scores.append(
                TaskScore(
                    task,
                    name if kept in ("none", "stripped") else f"{name} ({kept})",
                    float(before[key]),
                    float(value),
                    low,
                    high,
                    int(rows or len(pairs[0])),
                    higher.get(name),
                    int(tuned.get("n-shot", {}).get(task) or 0),
                    str(tuned.get("versions", {}).get(task, "")),
                    limit,
                    chat,
                )
            )
    return scores


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def _pairs(
    base: Mapping[str, Any], tuned: Mapping[str, Any], task: str, name: str, kept: str
) -> tuple[list[float], list[float]]:
    """The measure of each row that both models have, in one order."""
    found = []
    for result in (base, tuned):
        samples = [each for each in (result.get("samples") or {}).get(task, ()) if each.get("filter", kept) == kept]
        found.append({each["doc_id"]: each[name] for each in samples if _is_number(each.get(name))})
    both = sorted(found[0].keys() & found[1].keys())
    return [float(found[0][row]) for row in both], [float(found[1][row]) for row in both]


def _interval(one: list[float], other: list[float], base: float, tuned: float) -> tuple[float, float] | None:
    """The paired bootstrap's interval of a difference of means; None where the measure is not their mean."""
    if len(one) < FEWEST_ROWS or abs(np.mean(one) - base) > 1e-6 or abs(np.mean(other) - tuned) > 1e-6:
        return None
    gains = resamples(len(one))[1:] @ (np.array(other) - np.array(one)) / len(one)
    low, high = np.quantile(gains, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
