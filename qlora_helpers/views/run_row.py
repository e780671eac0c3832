"""One run as a row of a list: what was changed in it, how well it did, what it cost, and its state.

Reads the run's folder alone, which may come from anywhere: texts lose their control characters, and a folder that can't be read is
a row that says why. A sweep is a row, too. Knows no widgets and no model, and imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.profiles import PROFILES, profile_config
from qlora_helpers.base.text import plain, short_name, size_text
from qlora_helpers.evaluation.evaluation_file import read_evaluation
from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.result import score_text, score_value, scoring_from_dict
from qlora_helpers.runs.folder import Run, is_run_name
from qlora_helpers.runs.guard import refuse_links
from qlora_helpers.runs.space import folder_size, is_sweep
from qlora_helpers.runs.status import Status
from qlora_helpers.runs.sweep_file import SWEEP, SweepFile, read_sweep
from qlora_helpers.views.charts import number_text
from qlora_helpers.views.readings import points_of
from qlora_helpers.views.widgets.settings_code import differences

BROKEN = "broken"
MOST_CHANGES, LONGEST_TEXT, LONGEST_PROBLEM = 4, 60, 120
COLUMNS = ("run", "state", "changed settings", "data", "best loss", "score", "minutes", "USD", "size", "date")
NUMBERS = (4, 6, 7, 8)


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
    """What a list shows of one run, or of one sweep.

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
        sweep: what `sweep.json` holds, where the folder is a sweep's; the time and price are then those of its runs together.
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
    sweep: SweepFile | None = None

    @property
    def changes(self) -> str:
        """The changed settings in a line, the first few; those that a sweep varies, with all their values."""
        shown = [f"{name.partition('.')[2]}={value_text(value)}" for name, value in self.changed.items()]
        more = [f"and {len(shown) - MOST_CHANGES} more"] if len(shown) > MOST_CHANGES else []
        text = ", ".join([*shown[:MOST_CHANGES], *more])
        return f"sweep of {self.sweep.run}, {len(self.sweep.members)} runs: {text}" if self.sweep else text

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
        state = self.state + (self.step if self.state not in ("new", BROKEN) else "")
        what = self.problem or self.changes
        return [self.name, state, what, self.data, loss, score, minutes, price, size_text(self.n_bytes), date]

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
            "sweep": {"of": self.sweep.run, "runs": [each.name for each in self.sweep.members]} if self.sweep else None,
        }


def read_row(folder: Path) -> RunRow:
    """Reads what a list shows of the folder of a run or of a sweep, whatever it holds."""
    name = " ".join(plain(folder.name).split())[:LONGEST_TEXT]
    if not is_run_name(folder.name):
        return RunRow(name, BROKEN, "the folder's name can't be that of a run")
    run, problems = Run(folder), []
    found: dict[str, Any] = {"state": "new", "run": run}
    # One part that can't be read does not hide the others.
    readers = (_checked, _sweep, _state) if is_sweep(run) else (_checked, _settings, _state, _losses, _evaluated)
    for read in readers:
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


def _sweep(run: Run) -> dict[str, Any]:
    file = read_sweep(run)
    changed = {plain(name): [_plain_value(value) for value in values] for name, values in file.settings.items()}
    return {"sweep": file, "changed": changed, "date": (run.folder / SWEEP).stat().st_mtime}


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
