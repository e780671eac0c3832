"""Exercises of notebook 10: score fields, and write a prompt that does not hold its answer."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from typing import Any

from qlora_helpers.teaching.exercise import Exercise, Wrong, call, distinct, number_of


def field_f1(wanted, given):
    """The solution of `score_fields`."""
    right = sum(key in wanted and wanted[key] == value for key, value in given.items())
    return 2 * right / (len(wanted) + len(given)) if wanted or given else 1.0


def _drawn_fields(draw: random.Random) -> tuple[tuple[dict[str, str], dict[str, str]], dict[str, float]]:
    """Wanted and given fields, and what each way of scoring makes of them; the right one is the scorecard's own."""
    from qlora_helpers.evaluation.metrics.fields import json_metric

    keys = ["product", "issue", "wants", "deadline", "order", "mood"]
    wanted = {key: draw.choice("abc") for key in draw.sample(keys, draw.randrange(2, 6))}
    given = {
        key: wanted.get(key, "a") if draw.random() < 0.6 else "d" for key in draw.sample(keys, draw.randrange(2, 6))
    }
    (scored,) = json_metric().score([json.dumps(given)], [[json.dumps(wanted)]])
    right = sum(wanted.get(key) == value for key, value in given.items())
    return (wanted, given), {
        "right": scored["row_field_f1"] / 100,
        "precision": right / len(given),
        "recall": right / len(wanted),
        "keys-alone": 2 * len(set(wanted) & set(given)) / (len(wanted) + len(given)),
        "per-cent": scored["row_field_f1"],
        "mean": (right / len(given) + right / len(wanted)) / 2,
    }


def _judge_fields(function: Any) -> str:
    draw = random.Random()
    for _ in range(8):
        (wanted, given), values = distinct(lambda: _drawn_fields(draw))
        got = number_of(call(function, dict(wanted), dict(given)), "the F1")
        code = next((name for name, value in values.items() if math.isclose(got, value, abs_tol=1e-6)), "")
        if code == "right":
            continue
        if code:
            raise Wrong(code)
        raise Wrong(message=f"For {wanted} and the answer {given} the F1 is {values['right']:.3f}; got {got:.3f}.")
    return "Eight drawn answers agree with the metric that the scorecard uses."


SCORE_FIELDS = Exercise(
    name="score_fields",
    title="Score fields",
    kind="write",
    minutes=7,
    question="Write field_f1(wanted, given): two dictionaries become the F1 of their fields, between 0 and 1.",
    judge=_judge_fields,
    misconceptions={
        "precision": "That is the precision: right fields over given ones. A model that answers one sure field would get 1.",
        "recall": "That is the recall: right fields over wanted ones. A model that invents fields would lose nothing.",
        "keys-alone": "You compared the keys alone. A field is right when its key and its value are.",
        "per-cent": "That is in per cent; return a number between 0 and 1.",
        "mean": "That is the mean of precision and recall. F1 is their harmonic mean, 2 · right / (wanted + given).",
    },
    hints=(
        "Count the fields that are right: the key is in both, and the values are equal.",
        "F1 = 2 · right / (number of wanted fields + number of given fields).",
    ),
    solution_is=field_f1,
)

LEAKING_PROMPT = {"data.prompt": "{subject}\n{body}\nMood: {mood}", "data.answer": "{mood}"}
"""What the exercise starts from."""


def _judge_prompt(settings: Any) -> str:
    from qlora_helpers.base.config import DataConfig
    from qlora_helpers.base.errors import UserError
    from qlora_helpers.data.sources import read_corpus

    if not isinstance(settings, Mapping):
        raise Wrong(message="Hand over a dictionary with data.prompt and data.answer.")
    values = {name.removeprefix("data."): value for name, value in settings.items()}
    prompt, answer = str(values.get("prompt", "")), str(values.get("answer", ""))
    if "{mood}" not in answer:
        raise Wrong("other-answer")
    if "{mood}" in prompt:
        raise Wrong("leak")
    if "{body}" not in prompt:
        raise Wrong("nothing-to-read")
    try:
        corpus = read_corpus(DataConfig(source="embedded:tickets", prompt=prompt, answer=answer))
    except UserError as error:
        raise Wrong("unknown-column", error=str(error)) from None
    row = corpus.train[0]
    assert row.prompt
    return (
        f"{len(corpus.train)} rows, and no prompt holds its answer's column. The first is answered with {row.answer!r}."
    )


NO_LEAK = Exercise(
    name="no_leak",
    title="A prompt that holds its answer",
    kind="break and fix",
    minutes=4,
    question="With LEAKING_PROMPT a model learns nothing that is of use. Hand over settings for the same answer with a "
    "prompt that works.",
    judge=_judge_prompt,
    misconceptions={
        "leak": "The prompt holds the answer's own column: training would be perfect, and a new ticket has no mood to copy.",
        "other-answer": "The answer is no longer the ticket's mood. Change the prompt.",
        "nothing-to-read": "The prompt does not hold the mail: from the subject alone nobody can tell the mood.",
        "unknown-column": "A name in the prompt is no column of the file. {error}",
    },
    hints=(
        "Imagine a new ticket: which columns does it have before anybody has looked at it?",
        "Leave out the line with {mood}; better still, ask for the mood and say which words are allowed.",
    ),
    solution_is='{"data.prompt": "What is the mood of this mail?\\n\\n{subject}\\n{body}", "data.answer": "{mood}"}',
)
