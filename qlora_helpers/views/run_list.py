"""The runs of a folder side by side: what was changed in each, how well it did, what it cost, and how it stands.

Reads run folders alone. They may come from anywhere: texts lose their control characters, and a folder that can't be read is a row
that says why. Knows no widgets and no model, and imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.profiles import PROFILES, profile_config
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.text import plain, short_name, size_text
from qlora_helpers.base.units import duration
from qlora_helpers.evaluation.evaluation_file import read_evaluation
from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.result import score_text, score_value, scoring_from_dict
from qlora_helpers.runs.cleanup import folder_size
from qlora_helpers.runs.folder import Run, is_run_name
from qlora_helpers.runs.guard import refuse_links
from qlora_helpers.runs.opening import runs_root
from qlora_helpers.runs.status import Status
from qlora_helpers.runs.sweep_file import SWEEP
from qlora_helpers.views.charts import number_text
from qlora_helpers.views.follow import points_of
from qlora_helpers.views.widgets.settings_code import differences

BROKEN = "broken"
RUN_FILES = ("config.json", "status.json", "progress.jsonl")  # a folder with one of these is, or was, a run
MOST_CHANGES, LONGEST_TEXT, LONGEST_PROBLEM = 4, 60, 120


@dataclass(frozen=True)
class Score:
    """The measure that counts, of a run's tuned model.

    Attributes:
        key: of the measure.
        value: over the held-out rows.
        low, high: its interval; None with too few rows.
        gain: how much more than the untuned model's it is; None where that is not known.
    """

    key: str
    value: float
    low: float | None = None
    high: float | None = None
    gain: float | None = None

    def __str__(self) -> str:
        between = ""
        if self.low is not None and self.high is not None:
            between = f" ({score_text(self.low, self.key)} to {score_text(self.high, self.key)})"
        gain = "" if self.gain is None else f", {self.gain:+.1f}"
        return f"{measure_of(self.key).name} {score_text(self.value, self.key)}{between}{gain}"


@dataclass(frozen=True)
class RunRow:
    """What a list shows of one run.

    Attributes:
        name: the folder's name.
        state: as `Run.status` has it, or `broken`.
        problem: what is wrong with the folder; empty if nothing is.
        run: None where the folder's name can't be that of a run.
        config: the settings; None where they can't be read.
        changed: settings that differ from the profile's, and their values.
        data: the data's short name.
        best_loss, best_step: the lowest evaluation loss so far.
        score: after an evaluation.
        random_weights: whether the score means nothing.
        status: what `Run.status` returned.
        n_bytes: the folder's size.
        date: of the last sign of life, else of the settings; seconds since 1970.
    """

    name: str
    state: str
    problem: str = ""
    run: Run | None = None
    config: RunConfig | None = None
    changed: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    best_loss: float | None = None
    best_step: int | None = None
    score: Score | None = None
    random_weights: bool = False
    status: Status = Status()
    n_bytes: int = 0
    date: float = 0.0

    @property
    def changes(self) -> str:
        """The changed settings in a line, the first few."""
        shown = [f"{name.partition('.')[2]}={value_text(value)}" for name, value in self.changed.items()]
        more = [f"and {len(shown) - MOST_CHANGES} more"] if len(shown) > MOST_CHANGES else []
        return ", ".join([*shown[:MOST_CHANGES], *more])

    @property
    def step(self) -> str:
        """How far it is."""
        return f" {self.status.step} of {self.status.max_steps}" if self.status.max_steps else ""

    def cells(self) -> list[str]:
        """Returns a text for each of `COLUMNS`."""
        loss = "" if self.best_loss is None else number_text(self.best_loss)
        score = "random weights" if self.random_weights else str(self.score or "")
        minutes = f"{self.status.used_s / 60:.1f}" if self.status.used_s else ""
        price = "" if self.status.used_usd is None else f"{self.status.used_usd:.2f}"
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.date)) if self.date else ""
        if self.problem:
            return [
                self.name,
                BROKEN,
                self.problem,
                self.data,
                loss,
                score,
                minutes,
                price,
                size_text(self.n_bytes),
                date,
            ]
        state = self.state + (self.step if self.state != "new" else "")
        return [self.name, state, self.changes, self.data, loss, score, minutes, price, size_text(self.n_bytes), date]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "run": self.name,
            "state": self.state,
            "problem": self.problem,
            "step": self.status.step,
            "max_steps": self.status.max_steps,
            "profile": self.config.profile if self.config else None,
            "changed": self.changed,
            "data": self.data,
            "best_eval_loss": self.best_loss,
            "score": dataclasses.asdict(self.score) if self.score else None,
            "random_weights": self.random_weights,
            "seconds": self.status.used_s,
            "usd": self.status.used_usd,
            "bytes": self.n_bytes,
            "date": self.date,
        }


COLUMNS = ("run", "state", "changed settings", "data", "best loss", "score", "minutes", "USD", "size", "date")
NUMBERS = (4, 6, 7, 8)
_KEYS: dict[str, Callable[[RunRow], Any]] = {
    "run": lambda row: row.name,
    "state": lambda row: row.state,
    "changed settings": lambda row: row.changes or None,
    "data": lambda row: row.data or None,
    "best loss": lambda row: row.best_loss,
    "score": lambda row: row.score.value if row.score and not row.random_weights else None,
    "minutes": lambda row: row.status.used_s or None,
    "USD": lambda row: row.status.used_usd,
    "size": lambda row: row.n_bytes,
    "date": lambda row: row.date or None,
}


@dataclass(frozen=True, repr=False)
class RunList(Tabular):
    """Runs as rows; shows as a table.

    Attributes:
        rows: the runs that are shown.
        hidden: how many a filter left out.
    """

    rows: tuple[RunRow, ...]
    hidden: int = 0

    def __iter__(self) -> Iterator[RunRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def sorted_by(self, column: str = "run", *, descending: bool | None = None) -> RunList:
        """Returns the list in the order of a column; rows without a value come last.

        Args:
            column: one of `COLUMNS`, or how one begins.
            descending: the largest first; None takes the direction that puts what people look for first: the highest score, the
                newest date, the largest size, and the lowest of everything else.

        Raises:
            UserError: there is no such column.
        """
        full = next((name for name in COLUMNS if name.lower().startswith(column.strip().lower() or "?")), None)
        if full is None:
            raise UserError("no column has that name", expected=", ".join(COLUMNS), got=plain(column))
        down = full in ("score", "date", "size") if descending is None else descending
        key = _KEYS[full]
        known = sorted((row for row in self.rows if key(row) is not None), key=key, reverse=down)
        return dataclasses.replace(self, rows=(*known, *(row for row in self.rows if key(row) is None)))

    def reversed(self) -> RunList:
        """Returns the list the other way round."""
        return dataclasses.replace(self, rows=self.rows[::-1])

    def where(self, text: str) -> RunList:
        """Returns the runs that have every word of a text in one of their cells; `setting=value` also finds unchanged settings."""
        words = text.lower().split()
        kept = tuple(row for row in self.rows if all(_has(row, word) for word in words))
        return RunList(kept, self.hidden + len(self.rows) - len(kept))

    def table(self) -> Table:
        """Returns a row for each run."""
        note = [f"{self.hidden} runs are left out by the filter"] if self.hidden else []
        if not self.rows:
            return Table((), (), caption="no runs yet" if not self.hidden else "no run fits the filter", notes=note)
        return Table(COLUMNS, [row.cells() for row in self.rows], numbers=NUMBERS, notes=note)


def _has(row: RunRow, word: str) -> bool:
    if any(word in cell.lower() for cell in row.cells()):
        return True
    name, equals, value = word.partition("=")
    if not equals or row.config is None:
        return False
    settings = {
        f"{section}.{key}": item
        for section, values in row.config.to_dict().items()
        if isinstance(values, dict)
        for key, item in values.items()
    }
    return any(
        value_text(item).lower() == value for full, item in settings.items() if name in (full, full.partition(".")[2])
    )


def read_runs(root: str | os.PathLike[str] | None = None) -> RunList:
    """Reads all runs below a folder, in the order of their names.

    Args:
        root: the folder that holds the runs; None takes `$QLORA_RUNS`, else `runs`.
    """
    folder = runs_root(root)
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        found = []
    return RunList(tuple(read_row(path) for path in found if _was_run(path)))


def _was_run(folder: Path) -> bool:
    try:
        found = [name for name in RUN_FILES if os.path.lexists(folder / name)]
        return bool(found) and not (SWEEP in os.listdir(folder) and "config.json" not in found)
    except OSError:
        return False


def read_row(folder: Path) -> RunRow:
    """Reads what a list shows of a run's folder, whatever it holds."""
    name = " ".join(plain(folder.name).split())[:LONGEST_TEXT]
    if not is_run_name(folder.name):
        return RunRow(name, BROKEN, "the folder's name can't be that of a run")
    run, problems = Run(folder), []
    found: dict[str, Any] = {"state": "new", "run": run}
    # One part that can't be read does not hide the others.
    for read in (_checked, _settings, _state, _losses, _evaluated):
        try:
            found |= read(run)
        except (UserError, OSError, ValueError, TypeError, OverflowError) as error:
            text = error.problem if isinstance(error, UserError) and hasattr(error, "problem") else str(error)
            problems.append(" ".join(plain(text).split()).replace(f"{folder}{os.sep}", ""))
    if problems:
        found |= {"state": BROKEN, "problem": "; ".join(problems)[:LONGEST_PROBLEM]}
    return RunRow(name, **found)


def _checked(run: Run) -> dict[str, Any]:
    size = {"n_bytes": folder_size(run.folder.resolve())}
    refuse_links(run.folder)
    return size


def _settings(run: Run) -> dict[str, Any]:
    if not run.exists():
        raise UserError("config.json is missing")
    config, written = run.config(), run.config_path.stat().st_mtime
    start = profile_config(config.profile) if config.profile in PROFILES else RunConfig(profile=config.profile)
    changed = {name: _plain_value(value) for name, (value, _) in differences(config, start).items()}
    data = short_name(config.data.source)
    changed.pop("data.source", None)
    changed = {name: value for name, value in changed.items() if not name.startswith("data.embedded_")}
    return {"config": config, "changed": changed, "data": _short(data), "date": written}


def _state(run: Run) -> dict[str, Any]:
    status = run.status()
    return {"state": status.state, "status": status} | ({"date": status.heartbeat} if status.heartbeat else {})


def _losses(run: Run) -> dict[str, Any]:
    points = points_of(run.progress(), "eval_loss")
    if not points:
        return {}
    step, loss = min(points, key=lambda point: point[1])
    return {"best_loss": loss, "best_step": step}


def _evaluated(run: Run) -> dict[str, Any]:
    values = read_evaluation(run)
    main = scoring_from_dict(values.get("scoring", {})).main
    tuned, base = (values.get("scores", {}).get(name, {}) for name in ("tuned", "base"))
    value, before = score_value(tuned, main), score_value(base, main)
    if value is None:
        return {}
    score = Score(main, value, tuned.get("low"), tuned.get("high"), None if before is None else value - before)
    return {"score": score, "random_weights": bool(values.get("random_weights"))}


def _plain_value(value: Any) -> Any:
    return plain(value) if isinstance(value, str) else value


def value_text(value: Any) -> str:
    """Returns a setting's value for a table: without control characters, and cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return _short(str(value)) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _short(text: str) -> str:
    line = " ".join(plain(text).split())
    return line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 1] + "…"


def named_runs(
    names: Sequence[str | os.PathLike[str] | Run], *, root: str | os.PathLike[str] | None = None
) -> list[Run]:
    """Opens several runs by their names, paths or themselves, each once.

    Raises:
        RunError: one of them does not exist, or its folder holds links.
        UserError: fewer than two.
    """
    from qlora_helpers.runs.opening import existing_run

    found: dict[Path, Run] = {}
    for name in names:
        run = name if isinstance(name, Run) else existing_run(name, root=root)
        found.setdefault(run.folder.resolve(), run)
    if len(found) < 2:
        raise UserError(
            "a comparison needs two runs or more", got=", ".join(run.name for run in found.values()) or "none"
        )
    return list(found.values())


def total_line(runs: RunList) -> str:
    """Returns how many runs there are, and what they took together."""
    seconds, n_bytes = sum(row.status.used_s for row in runs), sum(row.n_bytes for row in runs)
    prices = [row.status.used_usd for row in runs if row.status.used_usd is not None]
    price = f", {sum(prices):.2f} USD" if prices else ""
    return f"{len(runs)} runs, {duration(seconds)} of training{price}, {size_text(n_bytes)}"
