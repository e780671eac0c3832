"""Says in words whether tuning was worth it, from the comparisons of the tuned model with its rivals. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.scorecard import FEWEST_ROWS, Comparison

MODELS = {
    "base": "untuned",
    "base_chat": "untuned, chat template",
    "base_few": "untuned, with examples",
    "tuned": "tuned",
}
"""Who answers: the untuned model under the trained prompt, under its own chat template and with training examples in the prompt."""
RUN = "run:"
"""What the name of another run begins with in scores and answers, so that no run's name is that of one of `MODELS`."""
RIVALS = {
    "base": "the untuned model",
    "base_chat": "the untuned model under its own chat template",
    "base_few": "the untuned model with examples in its prompt",
}


def rival_name(run: str) -> str:
    """Returns another run's name in scores and answers."""
    return RUN + run


def model_name(name: str) -> str:
    """Returns who answers under a name in scores and answers, for people to read."""
    return MODELS.get(name) or f"run {name.removeprefix(RUN)}"


def worth(comparisons: Mapping[str, Comparison]) -> str:
    """Returns whether the tuned model is better than each rival by the measure that counts; empty where nothing was compared.

    Args:
        comparisons: of the tuned model, by the rival's name in `RIVALS`.
    """
    gains = {name: comparisons[name].gain for name in RIVALS if name in comparisons}
    known = {name: gain for name, gain in gains.items() if gain is not None}
    if not known:
        return ""
    rows = min(gain.rows for gain in known.values())
    if rows < FEWEST_ROWS:
        return f"Whether tuning was worth it can't be told from {rows} rows: at least {FEWEST_ROWS} are needed."
    better, worse = (
        [RIVALS[name] for name, gain in known.items() if gain.verdict == word] for word in ("better", "worse")
    )
    unsure = [RIVALS[name] for name, gain in known.items() if not gain.can_tell]
    name = measure_of(next(iter(known.values())).measure).name
    if worse:
        return f"Tuning was not worth it: by {name}, {_listed(worse)} answers better than the tuned model."
    if unsure:
        but = f"the tuned model is better than {_listed(better)}, but " if better else ""
        between = f"these {rows} rows can't tell the tuned model from {_listed(unsure)}"
        return f"Whether tuning was worth it can't be told: by {name}, {but}{between}."
    missing = "" if "base_few" in known else " The untuned model was not asked with examples in its prompt."
    return f"Tuning was worth it: by {name}, the tuned model is better than {_listed(better)}.{missing}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
