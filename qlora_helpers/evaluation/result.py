"""The results of comparing base and tuned model: scores, rows with their answers, differences with intervals.

Takes and gives plain values; `evaluate` makes them. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.text import plain
from qlora_helpers.evaluation.scorecard import Comparison, comparison_from_dict


@dataclass(frozen=True)
class Scores:
    """Scores of one model under one prompt, over all held-out rows.

    Attributes:
        rouge1, rouge2, rouge_l: mean F-measure, 0 to 100.
        loss: nats per summary token; None where the model was only asked for answers.
        stop_rate: share of the answers that ended by themselves, 0 to 1.
        mean_tokens: mean length of an answer.
        repetition: share of an answer's runs of four words that occurred in it before, 0 to 1.
    """

    rouge1: float
    rouge2: float
    rouge_l: float
    stop_rate: float
    mean_tokens: float
    loss: float | None = None
    repetition: float = 0.0

    @property
    def perplexity(self) -> float | None:
        """exp of the loss."""
        return None if self.loss is None else math.exp(min(self.loss, 50.0))


MODELS = {"base": "untuned", "base_chat": "untuned, chat template", "tuned": "tuned"}


@dataclass(frozen=True)
class Evaluation(Tabular):
    """The comparison of base and tuned model, as `evaluation.json` holds it.

    Attributes:
        scores: `base`, `tuned` and, where it was asked, `base_chat` (the untuned model under its own chat template).
        rows: an object for each held-out row: `id`, `dialogue`, `summary`, `references`, each model's `answers` with scores.
        prompt_tokens_trimmed: rows whose dialogue was trimmed to fit.
        comparisons: the tuned model against each other model, by its name, with intervals.
        skipped: ids of held-out rows whose dialogue is in the training set too.
        form: how the answers were made.
    """

    scores: dict[str, Scores]
    rows: tuple[dict[str, Any], ...]
    prompt_tokens_trimmed: int = 0
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    form: tuple[str, ...] = ()

    @property
    def rouge_l_gain(self) -> float:
        """Points of ROUGE-L that the tuned model has more than the untuned one, on the same prompt."""
        return self.scores["tuned"].rouge_l - self.scores["base"].rouge_l

    def table(self) -> Table:
        """Returns a row of scores for each model, with what the rows can tell below."""
        header = ["model", "ROUGE-1", "ROUGE-2", "ROUGE-L", "stops", "repeated", "tokens", "loss", "perplexity"]
        lines = []
        for name, score in self.scores.items():
            loss = "" if score.loss is None else f"{score.loss:.3f}"
            perplexity = "" if score.perplexity is None else f"{score.perplexity:,.1f}"
            lines.append(
                [
                    MODELS[name],
                    f"{score.rouge1:.1f}",
                    f"{score.rouge2:.1f}",
                    f"{score.rouge_l:.1f}",
                    f"{score.stop_rate:.0%}",
                    f"{score.repetition:.0%}",
                    f"{score.mean_tokens:.0f}",
                    loss,
                    perplexity,
                ]
            )
        caption = f"{len(self.rows)} held-out rows"
        return Table(header, lines, caption=caption, notes=self.notes(), numbers=range(1, len(header)))

    def notes(self) -> list[str]:
        """What the rows can tell, and which of them do not count."""
        found = [
            f"tuned against {MODELS[name]}: {comparison.verdict()}" for name, comparison in self.comparisons.items()
        ]
        if self.skipped:
            found.append(f"skipped: {len(self.skipped)} held-out rows whose dialogue was trained on")
        if self.prompt_tokens_trimmed:
            found.append(f"{self.prompt_tokens_trimmed} of {len(self.rows)} dialogues were trimmed to fit")
        return found

    def side_by_side(self, rows: int = 5, *, outcome: str | None = None, against: str = "base") -> SideBySide:
        """Returns rows to browse: dialogue, reference and each model's answer.

        Args:
            rows: how many at most.
            outcome: `wins`, `ties` or `losses` of the tuned model, the clearest first; None takes the first rows.
            against: the model that the tuned one is compared with.
        """
        if outcome is None:
            return SideBySide(self.rows[:rows])
        by_id = {row["id"]: row for row in self.rows}
        return SideBySide([by_id[name] for name in getattr(self.comparisons[against], outcome)[:rows]])

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        scores = {name: asdict(score) | {"perplexity": score.perplexity} for name, score in self.scores.items()}
        return {
            "scores": scores,
            "rouge_l_gain": self.rouge_l_gain,
            "prompt_tokens_trimmed": self.prompt_tokens_trimmed,
            "comparisons": {name: found.to_dict() for name, found in self.comparisons.items()},
            "skipped": list(self.skipped),
            "form": list(self.form),
            "rows": list(self.rows),
        }


def evaluation_from_dict(values: dict[str, Any]) -> Evaluation:
    """Reads back what `Evaluation.to_dict` wrote; older files have no comparisons."""
    known = Scores.__dataclass_fields__
    scores = {
        name: Scores(**{key: item for key, item in score.items() if key in known})
        for name, score in values["scores"].items()
    }
    comparisons = {name: comparison_from_dict(found) for name, found in values.get("comparisons", {}).items()}
    return Evaluation(
        scores,
        tuple(values["rows"]),
        values["prompt_tokens_trimmed"],
        comparisons,
        tuple(values.get("skipped", ())),
        tuple(values.get("form", ())),
    )


class SideBySide(Tabular):
    """Dialogues with the reference and the answers beside them. Everything is escaped: nothing in a dialogue is ever run.

    Terminal codes, control characters and overrides of the writing direction are removed, in printed text too.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __repr__(self) -> str:
        """Returns the texts below each other: a dialogue has too many lines for a column of a terminal."""
        parts = []
        for row in self.rows:
            answers = [f"{MODELS[name] + ':':<24} {_one_line(a['text'])}" for name, a in row["answers"].items()]
            parts.append("\n".join([plain(row["dialogue"]), f"{'reference:':<24} {plain(row['summary'])}", *answers]))
        return "\n\n".join(parts)

    def table(self) -> Table:
        """Returns a row for each dialogue: its turns, the reference and each model's answer."""
        names = ["dialogue", "reference", *(MODELS[name] for name in (self.rows[0]["answers"] if self.rows else ()))]
        rows = [
            [plain(row["dialogue"]), plain(row["summary"]), *(_one_line(a["text"]) for a in row["answers"].values())]
            for row in self.rows
        ]
        return Table(names, rows)


def _one_line(text: str, most: int = 400) -> str:
    shown = " ".join(plain(text).split())
    return shown if len(shown) <= most else shown[:most] + " ..."
