"""The scores on the report page: rows of figures, sentences about them, and dialogues with their answers.

Functions take the values of an `evaluation.json` and return plain values for the template. This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qlora_helpers.base.text import plain
from qlora_helpers.evaluation.scorecard import comparison_from_dict

MODELS = {"base": "untuned", "base_chat": "untuned, its own chat template", "tuned": "tuned"}
DIALOGUES_SHOWN, OUTCOMES_SHOWN = 5, 3
FEW_ROWS = 100
LONGEST_DIALOGUE, LONGEST_ANSWER = 4000, 400  # characters shown


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


def score_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each model: its name, the cells in the table's order, and its bar in percent of the longest bar."""
    scores = {name: evaluation["scores"][name] for name in MODELS if name in evaluation.get("scores", ())}
    top = max((score["rouge_l"] for score in scores.values()), default=0.0)
    rows = []
    for name, score in scores.items():
        rouge = [f"{score[key]:.1f}" for key in ("rouge_l", "rouge1", "rouge2")]
        loss = score["loss"]
        losses = ["", ""] if loss is None else [f"{loss:.3f}", f"{math.exp(min(loss, 50.0)):,.1f}"]
        cells = [*rouge, percent(score["stop_rate"]), f"{score['mean_tokens']:.0f}", *losses]
        bar = f"{100 * score['rouge_l'] / top if top else 0:.1f}"
        rows.append({"model": MODELS[name], "tuned": name == "tuned", "bar": bar, "cells": cells})
    return rows


def verdicts(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns what the scores say, good or bad, in sentences."""
    if not has_scores(evaluation):
        return []
    scores, gain, rows = evaluation["scores"], evaluation["rouge_l_gain"], len(evaluation["rows"])
    change = "gained" if gain >= 0 else "lost"
    sentences = [f"With the same prompt, fine-tuning {change} {abs(gain):.1f} points of ROUGE-L."]
    if "base_chat" in scores:
        ahead = scores["tuned"]["rouge_l"] - scores["base_chat"]["rouge_l"]
        sentences.append(
            "With its own chat template, which is how it was made to be prompted, the untuned model reaches "
            f"{scores['base_chat']['rouge_l']:.1f}; the tuned model is {abs(ahead):.1f} points "
            f"{'above' if ahead >= 0 else 'below'} that."
        )
    comparisons = evaluation.get("comparisons", {})
    sentences += [f"Tuned against {MODELS[name]}: {found['verdict']}" for name, found in comparisons.items()]
    if rows < FEW_ROWS and not comparisons:  # a file from before intervals were computed
        sentences.append(f"With only {rows} dialogues, a difference of a point or two can be chance.")
    if count := len(evaluation.get("skipped", ())):
        sentences.append(
            f"{count} held-out dialogue{'s' * (count != 1)} also in the training set {'were' if count != 1 else 'was'} not counted."
        )
    if evaluation["prompt_tokens_trimmed"]:
        sentences.append(
            f"{evaluation['prompt_tokens_trimmed']} of {rows} dialogues were cut at the end to fit the sequence length."
        )
    return sentences


def intervals(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a table for each model that the tuned one was compared with: each measure, its difference, interval and verdict."""
    found = []
    for name, values in evaluation.get("comparisons", {}).items():
        lines = comparison_from_dict(values).table().rows
        if lines:
            found.append({"against": MODELS[name], "lines": lines, "level": percent(values["level"])})
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
            _answer(name, row["answers"][name]) for name in ("tuned", "base", "base_chat") if name in row["answers"]
        ],
    }


def _answer(name: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    count = f"{answer['tokens']} token{'s' * (answer['tokens'] != 1)}"
    rouge = f"ROUGE-L {answer['rouge_l']:.0f}, " if "rouge_l" in answer else ""
    return {
        "model": MODELS[name],
        "tuned": name == "tuned",
        "text": _shortened(" ".join(answer["text"].split()), LONGEST_ANSWER),
        "end": f"{rouge}{count}, {'ended by itself' if answer['stopped'] else 'cut off at the token limit'}",
    }


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
