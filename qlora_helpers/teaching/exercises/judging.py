"""Exercises of notebook 06: what may be claimed of a difference, and what a score does not see."""

from __future__ import annotations

import re
from typing import Any

from qlora_helpers.teaching.exercise import Exercise, Wrong, call

VERDICTS = ("better", "worse", "can't tell")


def verdict(before, after):
    """The solution of `may_you_claim_it`."""
    import random

    draw = random.Random(0)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    means = sorted(sum(draw.choices(differences, k=len(differences))) / len(differences) for _ in range(2000))
    low, high = means[49], means[1949]
    return "better" if low > 0 else "worse" if high < 0 else "can't tell"


def _judge_claim(function: Any) -> str:
    import numpy as np

    from qlora_helpers.evaluation.scorecard import resamples

    draw = np.random.default_rng()
    for kind in ("better", "noise", "worse", "paired", "few wins", "noise"):
        base = draw.normal(30, 12, 30)
        change = {
            "better": draw.normal(8, 4, 30),
            "worse": draw.normal(-8, 4, 30),
            "paired": draw.normal(2.5, 1.5, 30),  # small beside the rows' own spread
            "few wins": np.where(np.arange(30) < 8, 40.0, -2.0) + draw.normal(0, 0.1, 30),  # large gains in few rows
            "noise": _noise(draw),
        }[kind]
        weights = resamples(30)
        sampled = weights[1:] @ change / 30
        low, high = np.quantile(sampled, [0.025, 0.975])
        right = "better" if low > 0 else "worse" if high < 0 else "can't tell"
        got = call(function, base.tolist(), (base + change).tolist())
        if got not in VERDICTS:
            raise Wrong(message=f"Return one of {', '.join(map(repr, VERDICTS))}; got {got!r}.")
        if got == right:
            continue
        facts = {"mean": f"{change.mean():+.1f}", "low": f"{low:+.1f}", "high": f"{high:+.1f}"}
        if kind == "noise":
            raise Wrong("mean-alone", **facts)
        if kind == "paired":
            raise Wrong("not-paired", **facts)
        if kind == "few wins":
            raise Wrong("counts-wins", wins=int((change > 0).sum()), **facts)
        raise Wrong("never-sure" if got == "can't tell" else "wrong-way", **facts)
    return "Six drawn comparisons of thirty rows agree with the paired bootstrap interval."


def _noise(draw: Any) -> Any:
    """Differences whose mean is not zero and whose interval holds zero."""
    spread = draw.normal(0, 10, 30)
    return spread - spread.mean() + 1.2


MAY_YOU_CLAIM_IT = Exercise(
    name="may_you_claim_it",
    title="May you claim it?",
    kind="judge",
    minutes=10,
    question="Write verdict(before, after): the scores of two models on the same thirty rows become 'better', 'worse' or "
    '"can\'t tell", '
    "by the 95 % bootstrap interval of the mean difference.",
    judge=_judge_claim,
    misconceptions={
        "mean-alone": "The mean difference is {mean}, and its interval goes from {low} to {high}: it holds zero. Another "
        "thirty rows might "
        "say the opposite.",
        "not-paired": "Rows differ more from each other than the models do. Take the difference within each row first: its "
        "interval goes "
        "from {low} to {high}.",
        "counts-wins": "Only {wins} of 30 rows are better, but by far: the mean difference is {mean}, from {low} to "
        "{high}. Wins count "
        "heads, the mean counts points; the question is about the mean.",
        "never-sure": "The interval goes from {low} to {high}, on one side of zero: this may be claimed.",
        "wrong-way": "Look at the sign: the difference is after minus before, {mean} here.",
    },
    hints=(
        "Take one list of differences, after minus before, row by row.",
        "Draw thirty of them with replacement, a few thousand times, and keep each mean.",
        "Sort the means: the middle 95 % are the interval. Is zero inside?",
    ),
    solution_is=verdict,
)

REFERENCE = (
    "Anna can not come to the party on Friday because her train was cancelled, so Tom will bring the cake and the "
    "candles instead."
)
"""What is true, for `fool_the_score`."""
_KEY = {"not", "anna", "tom", "friday", "cancelled", "cake", "candles", "train", "party"}


def _judge_fool(answer: Any) -> str:
    from qlora_helpers.evaluation.metrics.text import TEXT

    if not isinstance(answer, str):
        raise Wrong(message="Hand over a sentence, as a text.")
    (scored,) = TEXT.score([answer], [[REFERENCE]])
    score = scored["rouge_l"]
    assert score is not None
    score = score * 100 if score <= 1 else score
    words, true = re.findall(r"\w+", answer.lower()), re.findall(r"\w+", REFERENCE.lower())
    if words == true:
        raise Wrong("same")
    if score < 90:
        raise Wrong("low", score=f"{score:.1f}")
    lost = {word for word in _KEY if words.count(word) < true.count(word)}
    swapped = [word for word in words if word in _KEY] != [word for word in true if word in _KEY]
    if not lost and not swapped:
        raise Wrong("still-true", score=f"{score:.1f}")
    return f"ROUGE-L {score:.1f}, and it says something else than the truth. A score counts words: read answers, too."


FOOL_THE_SCORE = Exercise(
    name="fool_the_score",
    title="What a score does not see",
    kind="judge",
    minutes=5,
    question="Write a sentence that says something false about REFERENCE and still gets a ROUGE-L of at least 90.",
    judge=_judge_fool,
    misconceptions={
        "same": "That is the reference itself, which is true.",
        "low": "ROUGE-L is {score}. Keep nearly all of its words in their order.",
        "still-true": "ROUGE-L is {score}, but it still says the same. Change who, when or whether.",
    },
    hints=("ROUGE-L counts words in the same order. Which single word carries the most meaning?", "Leave out 'not'."),
    solution_is=REFERENCE.replace("not ", ""),
    cell='exercises.REFERENCE.replace("not ", "")',
)
