"""The scores on the report page: rows of figures, sentences about them, and dialogues with their answers.

Functions take the values of an `evaluation.json` and return plain values for the template. This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_helpers.base.tables import Table
from qlora_helpers.base.text import plain
from qlora_helpers.evaluation.metrics.labels import confusion
from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.result import Scoring, score_text, score_value, scoring_from_dict
from qlora_helpers.evaluation.scorecard import LEVEL, amount, comparison_from_dict, points
from qlora_helpers.evaluation.worth import RUN, worth

MODELS = {
    "base": "untuned",
    "base_chat": "untuned, its own chat template",
    "base_few": "untuned, examples in its prompt",
    "tuned": "tuned",
}
DIALOGUES_SHOWN, OUTCOMES_SHOWN = 5, 3
FEW_ROWS = 100
ROW_SCORES = {"rouge_l": "ROUGE-L", "row_field_f1": "field F1"}  # values of an answer that are shown with it
RIGHT = ("correct", "exact_match", "number_right")  # values of an answer that are 0 or 100
LONGEST_DIALOGUE, LONGEST_ANSWER = 4000, 400  # characters shown


def shown_name(name: str) -> str:
    """Returns who answers under a name in an evaluation, as the page calls them."""
    return MODELS.get(name) or f"the run {name.removeprefix(RUN)}"


def _in_order(names: Iterable[str]) -> list[str]:
    """The names as the page lists them: the untuned model's prompts, the tuned model, other runs."""
    given = list(names)
    return [name for name in MODELS if name in given] + [name for name in given if name not in MODELS]


def has_scores(evaluation: Mapping[str, Any]) -> bool:
    """Returns whether the base and the tuned model were compared."""
    return {"base", "tuned"} <= set(evaluation.get("scores", ()))


def signed(value: float, digits: int = 1) -> str:
    """Returns a difference with its sign; the minus is the typographic one."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """Returns a share of 1 in whole percent, as 0 % or 100 % only if the share is exactly 0 or 1."""
    whole = round(100 * share)
    return f"{min(99, max(1, whole)) if 0 < share < 1 else whole} %"


def score_header(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns the names of the columns of `score_rows`, the measure that counts first."""
    scoring = scoring_from_dict(evaluation.get("scoring", {}))
    between = [f"{percent(LEVEL)} interval"] if scoring.metric != "text" else []
    names = [measure_of(scoring.main).name, *between, *(measure_of(key).name for key in _others(scoring))]
    return [*names, "Ends by itself", "Tokens", "Loss", "Perplexity"]


def score_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each model: its name, the cells in the header's order, and its bar in percent of the longest bar."""
    scores = {name: evaluation["scores"][name] for name in _in_order(evaluation.get("scores", ()))}
    scoring = scoring_from_dict(evaluation.get("scoring", {}))
    values = {name: score_value(score, scoring.main) or 0.0 for name, score in scores.items()}
    top = max(values.values(), default=0.0)
    rows = []
    for name, score in scores.items():
        cells = [_cell(score, scoring.main)]
        if scoring.metric != "text":
            between = [score_text(score.get(key), scoring.main) for key in ("low", "high")]
            cells.append(" to ".join(between) if all(between) else "")
        cells += [_cell(score, key) for key in _others(scoring)]
        loss = score["loss"]
        losses = ["", ""] if loss is None else [f"{loss:.3f}", f"{math.exp(min(loss, 50.0)):,.1f}"]
        cells += [percent(score["stop_rate"]), f"{score['mean_tokens']:.0f}", *losses]
        bar = f"{100 * max(0.0, values[name]) / top if top > 0 else 0:.1f}"
        rows.append({"model": shown_name(name), "tuned": name == "tuned", "bar": bar, "cells": cells})
    return rows


def _others(scoring: Scoring) -> list[str]:
    return [key for key in scoring.measures if key != scoring.main]


def _cell(score: Mapping[str, Any], key: str) -> str:
    text = score_text(score_value(score, key), key)
    return f"{text} %" if text and measure_of(key).unit == "%" else text


def main_card(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the measure that counts of the tuned and the untuned model: `name`, `before`, `after`, `gain`, and
    the gain without its sign as a text, `change`."""
    measure = measure_of(scoring_from_dict(evaluation.get("scoring", {})).main)
    scores = (evaluation["scores"][name] for name in ("base", "tuned"))
    before, after = (score_value(score, measure.key) for score in scores)
    if before is None or after is None:
        return None
    shown = [score_text(value, measure.key) for value in (before, after)]
    return {
        "name": measure.name,
        "before": shown[0],
        "after": shown[1],
        "gain": after - before,
        "change": points(after - before, measure),
    }


def verdicts(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns what the task is, whether tuning was worth it and what the scores say, good or bad, in sentences."""
    if not has_scores(evaluation):
        return []
    scores, rows = evaluation["scores"], len(evaluation["rows"])
    scoring = scoring_from_dict(evaluation.get("scoring", {}))
    comparisons = {name: comparison_from_dict(found) for name, found in evaluation.get("comparisons", {}).items()}
    sentences = [scoring.sentence()] if scoring.reason else []
    sentences += list(filter(None, [worth(comparisons)]))
    measure = measure_of(scoring.main)
    base, tuned = (score_value(scores[name], scoring.main) for name in ("base", "tuned"))
    if base is not None and tuned is not None:
        change = "gained" if tuned >= base else "lost"
        sentences.append(f"With the same prompt, fine-tuning {change} {amount(tuned - base, measure)}.")
        sentences += _rival_sentences(scores, scoring.main, tuned)
    sentences += [f"Tuned against {shown_name(name)}: {found.verdict()}" for name, found in comparisons.items()]
    if rows < FEW_ROWS and not comparisons:  # a file from before intervals were computed
        sentences.append(f"With only {rows} dialogues, a difference of a point or two can be chance.")
    if count := len(evaluation.get("skipped", ())):
        sentences.append(
            f"{count} held-out dialogue{'s' * (count != 1)} also in the training set {'were' if count != 1 else 'was'} not counted."
        )
    if evaluation["prompt_tokens_trimmed"]:
        sentences.append(
            f"{evaluation['prompt_tokens_trimmed']} of {rows} prompts were cut to fit the sequence length."
        )
    return sentences + [f"{_sentence(text)}" for text in (*scoring.notes, *evaluation.get("remarks", ()))]


def _rival_sentences(scores: Mapping[str, Any], main: str, tuned: float) -> list[str]:
    openings = {
        "base_chat": "With its own chat template, which is how it was made to be prompted,",
        "base_few": "With training examples in its prompt, which costs no training,",
    }
    found = []
    for name, opening in openings.items():
        value = score_value(scores.get(name, {}), main)
        if value is not None:
            found.append(
                f"{opening} the untuned model reaches {score_text(value, main)}; the tuned model is "
                f"{points(tuned - value, measure_of(main))} {'above' if tuned >= value else 'below'} that."
            )
    return found


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def about_scores(evaluation: Mapping[str, Any]) -> str:
    """Returns what a reader of the scores should know of their kind; empty for most."""
    if scoring_from_dict(evaluation.get("scoring", {})).metric != "text":
        return ""
    return (
        "ROUGE counts the words, word pairs and longest common sequences that an answer shares with the reference (F-measure, "
        "0 to 100). It rewards the same wording and does not know what is true."
    )


def confusions(evaluation: Mapping[str, Any]) -> list[Table]:
    """Returns the confusion table of the tuned model and of the untuned one where the answers are labels."""
    rows, tables = evaluation.get("rows", ()), []
    for name in ("tuned", "base"):
        answers = [row["answers"][name] for row in rows if name in row["answers"]]
        table = confusion(answers, caption=f"Expected labels, and what the {MODELS[name]} model answered")
        tables += [table] if table.rows else []
    return tables


def intervals(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a table for each model that the tuned one was compared with: each measure, its difference, interval and verdict."""
    found = []
    for name, values in evaluation.get("comparisons", {}).items():
        lines = comparison_from_dict(values).table().rows
        if lines:
            found.append({"against": shown_name(name), "lines": lines, "level": percent(values["level"])})
    return found


def outcomes(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the dialogues that the tuned model won, tied and lost against the untuned one: how many, and the clearest."""
    values = evaluation.get("comparisons", {}).get("base")
    if values is None:
        return []
    by_id = {row["id"]: row for row in evaluation["rows"]}
    words = {"wins": "closer to the reference", "ties": "as close", "losses": "further from the reference"}
    return [
        {
            "what": f"{len(values[key])} answers {what} than the untuned model's".replace(
                "as close than", "as close as"
            ),
            "dialogues": [_shown(by_id[name]) for name in values[key][:OUTCOMES_SHOWN]],
        }
        for key, what in words.items()
    ]


def shown_dialogues(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the first rows: turns, reference, and each model's answer on one line, the tuned model's first."""
    return [_shown(row) for row in evaluation.get("rows", ())[:DIALOGUES_SHOWN]]


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "turns": turns(_shortened(row["dialogue"], LONGEST_DIALOGUE)),
        "reference": row["summary"],
        "answers": [
            _answer(name, row["answers"][name])
            for name in ("tuned", *(name for name in _in_order(row["answers"]) if name != "tuned"))
            if name in row["answers"]
        ],
    }


def _answer(name: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    count = f"{answer['tokens']} token{'s' * (answer['tokens'] != 1)}"
    known = {key: answer.get(key) for key in ROW_SCORES if answer.get(key) is not None}
    score = "".join(f"{ROW_SCORES[key]} {value:.0f}, " for key, value in known.items())
    score += {None: "", 0.0: "wrong, ", 100.0: "right, "}[_right(answer)]
    return {
        "model": shown_name(name),
        "tuned": name == "tuned",
        "text": _shortened(" ".join(answer["text"].split()), LONGEST_ANSWER),
        "end": f"{score}{count}, {'ended by itself' if answer['stopped'] else 'cut off at the token limit'}",
    }


def _right(answer: Mapping[str, Any]) -> float | None:
    """100 for a right answer and 0 for a wrong one, where answers are one or the other."""
    return next((answer[key] for key in RIGHT if answer.get(key) in (0.0, 100.0)), None)


def turns(dialogue: str) -> list[tuple[str, str]]:
    """Returns speaker and text of each line; the speaker is empty if the line has none, as in `https://...`."""
    found = []
    for line in plain(dialogue).splitlines():
        speaker, colon, text = line.partition(":")
        named = colon and 0 < len(speaker.strip()) <= 40 and not text.startswith("/")
        found.append((speaker.strip(), text.strip()) if named else ("", line))
    return found


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."
