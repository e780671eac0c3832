"""The results of comparing base and tuned model: scores, rows with their answers, differences with intervals.

Takes and gives plain values; `evaluate` makes them. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.text import plain
from qlora_helpers.evaluation.metrics.labels import confusion
from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.scorecard import (
    LEVEL,
    Comparison,
    compare,
    comparison_from_dict,
    gain_cells,
    number_text,
)
from qlora_helpers.evaluation.worth import MODELS as MODELS
from qlora_helpers.evaluation.worth import model_name, worth


@dataclass(frozen=True)
class Scores:
    """Scores of one model under one prompt, over all held-out rows.

    Attributes:
        rouge1, rouge2, rouge_l: mean F-measure, 0 to 100; None where the task is no free text.
        stop_rate: share of the answers that ended by themselves, 0 to 1.
        mean_tokens: mean length of an answer.
        loss: nats per answer token; None where the model was only asked for answers.
        repetition: share of an answer's runs of four words that occurred in it before, 0 to 1.
        measures: every measure of the task's metric by its key; None where no row has it.
        low, high: the interval of the measure that counts; None with too few rows.
    """

    rouge1: float | None
    rouge2: float | None
    rouge_l: float | None
    stop_rate: float
    mean_tokens: float
    loss: float | None = None
    repetition: float = 0.0
    measures: dict[str, float | None] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None

    @property
    def perplexity(self) -> float | None:
        """exp of the loss."""
        return None if self.loss is None else math.exp(min(self.loss, 50.0))

    def value(self, key: str) -> float | None:
        """One measure of the task; None where no row has it."""
        return self.measures.get(key, getattr(self, key, None))


@dataclass(frozen=True)
class Scoring:
    """How the answers were scored; the defaults are those of files from before there was a choice.

    Attributes:
        metric: the metric's name.
        task: what the answers are, in words.
        main: the key of the measure that counts.
        measures: the keys of all its measures.
        reason: why it is this metric.
        notes: what a person should know about how it counts.
    """

    metric: str = "text"
    task: str = "free text"
    main: str = "rouge_l"
    measures: tuple[str, ...] = ("rouge1", "rouge2", "rouge_l")
    reason: str = ""
    notes: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Returns what the task is and which measure counts."""
        why = f" (metric {self.metric}: {self.reason})" if self.reason else ""
        return f"The answers are {self.task}{why}; {measure_of(self.main).name} counts."


@dataclass(frozen=True)
class Evaluation(Tabular):
    """The comparison of base and tuned model, as `evaluation.json` holds it.

    Attributes:
        scores: `base`, `tuned` and, where it was asked, `base_chat` (the untuned model under its own chat template) and
            `base_few` (the untuned model with training examples in its prompt).
        rows: an object for each held-out row: `id`, `dialogue`, `summary`, `references`, each model's `answers` with scores.
        prompt_tokens_trimmed: rows whose dialogue was trimmed to fit.
        comparisons: the tuned model against each other model, by its name, with intervals.
        skipped: ids of held-out rows whose dialogue is in the training set too.
        form: how the answers were made.
        scoring: what was measured, and why.
        remarks: what else a person should know of these scores.
    """

    scores: dict[str, Scores]
    rows: tuple[dict[str, Any], ...]
    prompt_tokens_trimmed: int = 0
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    form: tuple[str, ...] = ()
    scoring: Scoring = Scoring()
    remarks: tuple[str, ...] = ()

    @property
    def rouge_l_gain(self) -> float | None:
        """Points of ROUGE-L that the tuned model has more than the untuned one, on the same prompt; None for other tasks."""
        return self._gain("rouge_l")

    @property
    def gain(self) -> float | None:
        """By how much the tuned model has more of the measure that counts than the untuned one, on the same prompt."""
        return self._gain(self.scoring.main)

    def _gain(self, key: str) -> float | None:
        tuned, base = (self.scores[name].value(key) if name in self.scores else None for name in ("tuned", "base"))
        return None if tuned is None or base is None else tuned - base

    @property
    def worth(self) -> str:
        """Whether tuning was worth it, in a sentence; empty where nothing was compared."""
        return worth(self.comparisons)

    def table(self) -> Table:
        """Returns a row of scores for each model, with what the rows can tell below."""
        keys, main = self.scoring.measures, self.scoring.main
        header, lines = ["model"], [[model_name(name)] for name in self.scores]
        for key in keys:
            header.append(measure_of(key).label)
            for line, score in zip(lines, self.scores.values(), strict=True):
                line.append(score_text(score.value(key), key))
            if key == main and self.scoring.metric != "text":
                header.append(f"{LEVEL:.0%} interval")
                for line, score in zip(lines, self.scores.values(), strict=True):
                    line.append(
                        "" if score.low is None else f"{score_text(score.low, key)} to {score_text(score.high, key)}"
                    )
        header += ["stops", "repeated", "tokens", "loss", "perplexity"]
        for line, score in zip(lines, self.scores.values(), strict=True):
            line += [f"{score.stop_rate:.0%}", f"{score.repetition:.0%}", f"{score.mean_tokens:.0f}"]
            line.append("" if score.loss is None else f"{score.loss:.3f}")
            line.append("" if score.perplexity is None else f"{score.perplexity:,.1f}")
        caption = f"{len(self.rows)} held-out rows"
        return Table(header, lines, caption=caption, notes=self.notes(), numbers=range(1, len(header)))

    def notes(self) -> list[str]:
        """What was measured, what the rows can tell, and which of them do not count."""
        found = [self.scoring.sentence()]
        found += [
            f"tuned against {model_name(name)}: {comparison.verdict()}" for name, comparison in self.comparisons.items()
        ]
        found += [self.worth] if self.worth else []
        if self.skipped:
            found.append(f"skipped: {len(self.skipped)} held-out rows whose dialogue was trained on")
        if self.prompt_tokens_trimmed:
            found.append(f"{self.prompt_tokens_trimmed} of {len(self.rows)} prompts were cut to fit")
        return found + list(self.remarks)

    def compare(self, first: str, second: str) -> Comparison:
        """Compares any two of those who answered, by their names in `scores`: paired intervals of every measure."""
        return compare(self.rows, first, second, metric=self.scoring)

    def pairs(self) -> Table:
        """Returns a row for each two of those who answered: the difference in the measure that counts, and what it says."""
        names = list(self.scores)
        found = [self.compare(one, other) for index, one in enumerate(names) for other in names[index + 1 :]]
        rows = [[model_name(each.first), model_name(each.second), *gain_cells(each.gain)] for each in found]
        header = [
            "first",
            "second",
            f"{measure_of(self.scoring.main).name}, second − first",
            f"{LEVEL:.0%} interval",
            "verdict",
        ]
        return Table(header, rows, caption=f"all pairs on the same {len(self.rows)} rows", numbers=range(2, 4))

    def confusion(self, model: str = "tuned") -> Table:
        """Returns how often each expected label was answered by which one; without rows where the answers are no labels."""
        answers = [row["answers"][model] for row in self.rows if model in row["answers"]]
        return confusion(answers, caption=f"expected labels and what the model ({model_name(model)}) answered")

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
            "gain": self.gain,
            "prompt_tokens_trimmed": self.prompt_tokens_trimmed,
            "comparisons": {name: found.to_dict() for name, found in self.comparisons.items()},
            "skipped": list(self.skipped),
            "form": list(self.form),
            "scoring": asdict(self.scoring),
            "worth": self.worth,
            "remarks": list(self.remarks),
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
        scoring_from_dict(values.get("scoring", {})),
        tuple(values.get("remarks", ())),
    )


def scoring_from_dict(values: Mapping[str, Any]) -> Scoring:
    """Reads back how answers were scored; older files do not say, and hold ROUGE."""
    kept = {key: values[key] for key in Scoring.__dataclass_fields__ if key in values}
    lists: dict[str, Any] = {key: tuple(value) for key, value in kept.items() if isinstance(value, list)}
    return Scoring(**(kept | lists))


def score_cells(score: Mapping[str, Any], scoring: Scoring) -> list[str]:
    """Returns one model's measures as a table shows them, from the values of an `evaluation.json`."""
    return [score_text(score_value(score, key), key) for key in scoring.measures]


def score_value(score: Mapping[str, Any], key: str) -> float | None:
    """Returns one measure from the values of an `evaluation.json`; files of earlier versions hold ROUGE beside the others."""
    return score.get("measures", {}).get(key, score.get(key))


def score_text(value: float | None, key: str) -> str:
    """Returns a measure as tables show it; empty where it is None."""
    if value is None:
        return ""
    return f"{value:.1f}" if measure_of(key).unit in ("%", "points") else number_text(value)


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
            answers = [f"{model_name(name) + ':':<24} {_one_line(a['text'])}" for name, a in row["answers"].items()]
            parts.append("\n".join([plain(row["dialogue"]), f"{'reference:':<24} {plain(row['summary'])}", *answers]))
        return "\n\n".join(parts)

    def table(self) -> Table:
        """Returns a row for each dialogue: its turns, the reference and each model's answer."""
        names = [
            "dialogue",
            "reference",
            *(model_name(name) for name in (self.rows[0]["answers"] if self.rows else ())),
        ]
        rows = [
            [plain(row["dialogue"]), plain(row["summary"]), *(_one_line(a["text"]) for a in row["answers"].values())]
            for row in self.rows
        ]
        return Table(names, rows)


def _one_line(text: str, most: int = 400) -> str:
    shown = " ".join(plain(text).split())
    return shown if len(shown) <= most else shown[:most] + " ..."
