"""A run's `evaluation.json`: written by an evaluation, read by reports and model cards. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_values
from qlora_helpers.evaluation.result import Evaluation, Scores, Scoring
from qlora_helpers.evaluation.scorecard import Difference
from qlora_helpers.runs.folder import Run


@dataclass(frozen=True)
class Answer:
    """One model's answer to a held-out row; its scores stand beside these."""

    text: str
    tokens: int
    stopped: bool
    rouge_l: float | None = None


@dataclass(frozen=True)
class Row:
    """A held-out row with the answers of each model."""

    id: str
    dialogue: str
    summary: str
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Compared:
    """The tuned model compared with another one (`scorecard.Comparison`)."""

    first: str
    second: str
    differences: tuple[Difference, ...]
    wins: tuple[str, ...]
    ties: tuple[str, ...]
    losses: tuple[str, ...]
    verdict: str
    level: float
    main: str = "rouge_l"


@dataclass(frozen=True)
class EvaluationFile:
    """What `evaluation.json` holds; see `result.Evaluation`."""

    scores: dict[str, Scores]
    rouge_l_gain: float | None
    prompt_tokens_trimmed: int
    rows: tuple[Row, ...]
    comparisons: dict[str, Compared] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    form: tuple[str, ...] = ()
    scoring: Scoring = Scoring()
    worth: str = ""
    remarks: tuple[str, ...] = ()
    random_weights: bool = False

    RENAMED: ClassVar[dict[str, str]] = {"left_out": "skipped"}


def read_evaluation(run: Run) -> dict[str, Any]:
    """Reads the run's `evaluation.json` as plain values under today's names; empty if it was not evaluated.

    Raises:
        RunError: the file is damaged.
    """
    if not run.evaluation_path.exists():
        return {}
    return read_values(run.evaluation_path, EvaluationFile, next_step="Delete it and evaluate the run again.")


def write_evaluation(run: Run, result: Evaluation, *, random_weights: bool) -> None:
    """Writes the run's `evaluation.json`.

    Args:
        run: the run.
        result: what was found.
        random_weights: whether the model has random weights, so that its scores mean nothing.
    """
    write_json(run.evaluation_path, result.to_dict() | {"random_weights": random_weights})
