"""What an `evaluation.json` says on the report's page: rows of scores, sentences about them, dialogues with their answers.

Takes and gives plain values; how the file came about is `evaluation`'s, how it looks the page's. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qlora_helpers.tables import plain

MODELS = {"base": "untuned", "base_chat": "untuned, its own chat template", "tuned": "tuned"}
DIALOGUES_SHOWN = 5
FEW_ROWS = 100
LONGEST_DIALOGUE, LONGEST_ANSWER = 4000, 400  # characters shown


def has_scores(evaluation: Mapping[str, Any]) -> bool:
    """Whether base and tuned model were compared."""
    return {"base", "tuned"} <= set(evaluation.get("scores", ()))


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign, a real minus where it fell."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """A share of 1 in whole percent, which is 0 % and 100 % only where it really is."""
    whole = round(100 * share)
    return f"{min(99, max(1, whole)) if 0 < share < 1 else whole} %"


def score_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a model: its name, the cells in the table's order, and the length of its bar in percent of the longest."""
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
    """What the scores say, good or bad, in sentences."""
    if not has_scores(evaluation):
        return []
    scores, gain, rows = evaluation["scores"], evaluation["rouge_l_gain"], len(evaluation["rows"])
    change = "gained" if gain >= 0 else "lost"
    said = [f"Asked with the same prompt, the model {change} {abs(gain):.1f} points of ROUGE-L by the tuning."]
    if "base_chat" in scores:
        ahead = scores["tuned"]["rouge_l"] - scores["base_chat"]["rouge_l"]
        said.append(
            "Asked in its own chat template, the way it was made to be asked, the untuned model reaches "
            f"{scores['base_chat']['rouge_l']:.1f}; the tuned one is {abs(ahead):.1f} points "
            f"{'above' if ahead >= 0 else 'below'} that."
        )
    if rows < FEW_ROWS:
        said.append(f"{rows} dialogues are few: a difference of a point or two can be chance.")
    if evaluation["prompt_tokens_trimmed"]:
        said.append(
            f"{evaluation['prompt_tokens_trimmed']} of {rows} dialogues were cut at their end to fit the model's block."
        )
    return said


def shown_dialogues(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first rows: turns, reference, and each model's answer on one line, the tuned one's first."""
    return [
        {
            "turns": turns(_shortened(row["dialogue"], LONGEST_DIALOGUE)),
            "reference": row["summary"],
            "answers": [
                _answer(name, row["answers"][name]) for name in ("tuned", "base", "base_chat") if name in row["answers"]
            ],
        }
        for row in evaluation.get("rows", ())[:DIALOGUES_SHOWN]
    ]


def _answer(name: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    count = f"{answer['tokens']} token{'s' * (answer['tokens'] != 1)}"
    return {
        "model": MODELS[name],
        "tuned": name == "tuned",
        "text": _shortened(" ".join(answer["text"].split()), LONGEST_ANSWER),
        "end": f"{count}, {'ended by itself' if answer['stopped'] else 'cut off at the limit'}",
    }


def turns(dialogue: str) -> list[tuple[str, str]]:
    """Speaker and text of each line; no speaker where a line does not begin with one, as in `https://...`."""
    found = []
    for line in plain(dialogue).splitlines():
        speaker, colon, text = line.partition(":")
        named = colon and 0 < len(speaker.strip()) <= 40 and not text.startswith("/")
        found.append((speaker.strip(), text.strip()) if named else ("", line))
    return found


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."
