"""`suite.json`: what lm-eval's tasks said of a run's base and tuned model. Imports no torch and no lm-eval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_record
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.evaluation.scorecard import FEWEST_ROWS, LEVEL
from qlora_helpers.runs.folder import Run

FILE = "suite.json"


@dataclass(frozen=True)
class TaskScore:
    """One measure of one task, of the base and of the tuned model, in lm-eval's own units.

    Attributes:
        task, measure: their names in lm-eval, such as `arc_easy` and `acc_norm`.
        base, tuned: the measure of each.
        low, high: the interval of `tuned - base`, by a paired bootstrap over the same rows; None where there are fewer than
            `scorecard.FEWEST_ROWS`, or where the measure is no mean over rows.
        rows: how many were asked.
        higher_is_better: None where lm-eval does not say.
        shots: examples before each question.
        version: of the task.
        limit: at most so many rows were to be asked; None is all.
        chat: whether prompts went through the chat template.
    """

    task: str
    measure: str
    base: float
    tuned: float
    low: float | None
    high: float | None
    rows: int
    higher_is_better: bool | None = None
    shots: int = 0
    version: str = ""
    limit: int | None = None
    chat: bool = False

    def verdict(self) -> str:
        """What the interval says, in two words or three."""
        if self.low is None or self.high is None:
            return "too few rows" if self.rows < FEWEST_ROWS else "no interval"
        if self.low <= 0 <= self.high:
            return "no clear difference"
        better = (self.low > 0) == (self.higher_is_better is not False)
        return "higher" if self.higher_is_better is None and self.low > 0 else "better" if better else "worse"


@dataclass(frozen=True)
class Suite(Tabular):
    """What `suite.json` holds.

    Attributes:
        scores: of all tasks that were asked with this adapter.
        adapter_sha256: of the adapter's weights.
        harness: lm-eval's version.
        notes: what a reader must know.
        random_weights: whether the model has random weights, so that its scores mean nothing.
        made: when, UTC.
    """

    scores: tuple[TaskScore, ...]
    adapter_sha256: str
    harness: str
    notes: tuple[str, ...] = ()
    random_weights: bool = False
    made: str = ""

    def table(self) -> Table:
        """Returns a row for each measure of each task."""
        header = ["task", "measure", "shots", "rows", "base", "tuned", f"{LEVEL:.0%} interval of the difference", ""]
        return Table(header, [cells(score) for score in self.scores], notes=self.notes, numbers=(2, 3, 4, 5))


def cells(score: TaskScore) -> list[str]:
    """Returns a score as texts: task, measure, shots, rows, base, tuned, interval, verdict."""
    between = "" if score.low is None or score.high is None else f"{score.low:+.3f} to {score.high:+.3f}"
    rows = f"{score.rows}" if score.limit is None else f"first {score.rows}"
    numbers = [f"{score.base:.3f}", f"{score.tuned:.3f}", between, score.verdict()]
    return [score.task, score.measure, str(score.shots), rows, *numbers]


def read_suite(run: Run) -> Suite | None:
    """Reads the run's `suite.json`; None if no task was asked.

    Raises:
        RunError: the file is damaged.
    """
    path = run.folder / FILE
    return read_record(path, Suite, next_step="Delete it and ask the tasks again.") if path.exists() else None


def keep_suite(run: Run, found: Suite) -> Suite:
    """Writes the run's `suite.json` and returns what it holds: other tasks' scores of the same adapter stay in it."""
    try:
        before = read_suite(run)
    except RunError:
        before = None
    asked = {score.task for score in found.scores}
    same = before is not None and (before.adapter_sha256, before.harness) == (found.adapter_sha256, found.harness)
    kept = [score for score in before.scores if score.task not in asked] if before and same else []
    notes = [note for note in before.notes if before and note not in found.notes] if before and kept else []
    values: dict[str, Any] = asdict(found)
    values["scores"] = [asdict(score) for score in (*kept, *found.scores)]
    values["notes"] = [*notes, *found.notes]
    write_json(run.folder / FILE, values)
    return read_record(run.folder / FILE, Suite)
