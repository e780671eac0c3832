"""A run's `evaluation.json`: written by an evaluation, read by reports and model cards. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_values
from qlora_helpers.base.text import Say
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
    """What `evaluation.json` holds; see `result.Evaluation`. `made` says when its last answer was given, UTC."""

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
    made: str = ""

    RENAMED: ClassVar[dict[str, str]] = {"left_out": "skipped"}


def read_evaluation(run: Run) -> dict[str, Any]:
    """Reads the run's `evaluation.json` as plain values under today's names; empty if it was not evaluated.

    Raises:
        RunError: the file is damaged.
    """
    if not run.evaluation_path.exists():
        return {}
    return read_values(run.evaluation_path, EvaluationFile, next_step="Delete it and evaluate the run again.")


def unwritable(run: Run) -> str:
    """Returns why the run's folder takes no file, empty where it does; found out by writing one."""
    try:
        with tempfile.TemporaryFile(dir=run.folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def keep_evaluation(run: Run, result: Evaluation, *, random_weights: bool, asked: bool = True, say: Say) -> Path:
    """Writes the run's `evaluation.json`; where the run's folder does not take it, a file in another folder, and says so.

    Args:
        run, result, random_weights, asked: as for `write_evaluation`.
        say: called with where the result is, if it is not in the run's folder.

    Returns:
        The path of the file.

    Raises:
        RunError: no folder takes it.
    """
    try:
        write_evaluation(run, result, random_weights=random_weights, asked=asked)
        return run.evaluation_path
    except RunError as error:
        values, name = _values(result, random_weights, _now()), f"{run.name}-evaluation.json"
        folder = Path.cwd() if os.access(Path.cwd(), os.W_OK) else Path(tempfile.mkdtemp(prefix="qlora-"))
        path = _free(folder / name)
        write_json(path, values)
        say(f"{error.problem}; the answers and scores are kept in {path}.")
        return path


def _free(path: Path) -> Path:
    """The path, or the first with a number at its end that does not exist yet."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in numbered if not other.exists())


def write_evaluation(run: Run, result: Evaluation, *, random_weights: bool, asked: bool = True) -> None:
    """Writes the run's `evaluation.json`; a file that says the same already is left alone.

    Args:
        run: the run.
        result: what was found.
        random_weights: whether the model has random weights, so that its scores mean nothing.
        asked: whether answers were given now; False keeps the time of those that the file holds.
    """
    before: dict[str, Any] = {}
    with contextlib.suppress(RunError):
        before = read_evaluation(run)
    made = _now() if asked else str(before.get("made", "")) or _now()
    values = _values(result, random_weights, made)
    if json.dumps(values, sort_keys=True) != json.dumps(before, sort_keys=True):
        write_json(run.evaluation_path, values)


def _values(result: Evaluation, random_weights: bool, made: str) -> dict[str, Any]:
    return result.to_dict() | {"random_weights": random_weights, "made": made}


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
