"""A sweep as a person sees it: planned with time and price of all its runs, started, followed, stopped, resumed, and ranked.

Reads the sweep's folder and those of its runs; `runs.sweep` trains them in a process of its own. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.units import duration
from qlora_helpers.evaluation.evaluation_file import read_evaluation
from qlora_helpers.evaluation.ranking import Ranking, rank
from qlora_helpers.planning.cost import TrainingCost
from qlora_helpers.planning.sweep_cost import sweep_costs
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import run_at
from qlora_helpers.runs.requests import Request
from qlora_helpers.runs.status import Status
from qlora_helpers.runs.sweep import folder_for, is_evaluated, is_trained, make_sweep, start_sweep
from qlora_helpers.runs.sweep_file import SUFFIX, SWEEP, SweepFile, members_of, read_sweep
from qlora_helpers.views.run_comparison import RunComparison, comparison_of
from qlora_helpers.views.run_list import read_row, value_text


@dataclass(frozen=True, repr=False)
class Sweep(Tabular):
    """Runs that differ in up to two settings, trained one after another under one budget; shows as a table.

    Attributes:
        folder: the sweep's folder, as a `Run`; it need not exist before `start`.
        file: its runs, settings and budget.
        base: the run whose other settings all of them share; None where the sweep was opened by its own name.
        costs: what each run is expected to take; empty where the sweep was opened by its own name.
    """

    folder: Run
    file: SweepFile
    base: Run | None = None
    costs: tuple[TrainingCost, ...] = ()

    @property
    def runs(self) -> list[Run]:
        """The sweep's runs, which need not exist yet."""
        return [Run(self.folder.folder.parent / member.name) for member in self.file.members]

    @property
    def seconds(self) -> float | None:
        """What all runs together are expected to take, evaluations left out; None where it can't be estimated."""
        known = [cost.seconds for cost in self.costs if cost.seconds is not None]
        return sum(known) if known and len(known) == len(self.file.members) else None

    @property
    def usd(self) -> float | None:
        """The price of that; None where it is not known."""
        known = [cost.dollars for cost in self.costs if cost.dollars is not None]
        return sum(known) if known and len(known) == len(self.file.members) else None

    def status(self) -> Status:
        """Returns what the sweep is doing: `new`, `running`, `stopped`, `finished`, `failed` or `dead`.

        Raises:
            RunError: its status is damaged.
        """
        return self.folder.status()

    def start(self) -> Sweep:
        """Starts the sweep in a process of its own, or resumes it where it was stopped, and returns at once.

        Raises:
            RunError: it is running already, a run of one of the names has other settings, or its budget is used up.
        """
        if self.base is not None:
            make_sweep(self.base, self.file)
        start_sweep(self.folder)
        return self

    resume = start

    def stop(self) -> Request:
        """Asks the sweep to stop: the run that trains saves first. `start` goes on from there.

        Raises:
            RunError: it is not running.
        """
        return self.folder.request("stop")

    def ranking(self) -> Ranking:
        """Returns the runs that are evaluated by the measure that counts, and which of them the rows can't tell apart."""
        found: dict[str, dict[str, Any]] = {}
        for run in self.runs:
            found[run.name] = {}
            with contextlib.suppress(UserError, OSError):
                found[run.name] = read_evaluation(run)
        return rank(found)

    def compare(self) -> RunComparison:
        """Returns the runs that exist side by side.

        Raises:
            UserError: fewer than two exist.
        """
        existing = [run for run in self.runs if run.exists()]
        if len(existing) < 2:
            raise UserError("the sweep has not begun: there are no two runs to compare", next_step="Start it first.")
        return comparison_of(existing)

    def table(self) -> Table:
        """Returns a row for each run, with what it is expected to take, or how it stands."""
        names = list(self.file.settings)
        header = ["run", *names, "about", "USD", "state", "best loss", "score"]
        lines = []
        for number, member in enumerate(self.file.members):
            cost = self.costs[number] if self.costs else None
            row = read_row(self.folder.folder.parent / member.name)
            has_begun = row.run is not None and row.run.exists()
            loss, score = row.cells()[4:6] if has_begun else ("", "")
            lines.append(
                [
                    member.name,
                    *(value_text(member.settings[name]) for name in names),
                    duration(cost.seconds) if cost and cost.seconds is not None else "",
                    f"{cost.dollars:,.2f}" if cost and cost.dollars is not None else "",
                    row.state + row.step if has_begun else "not begun",
                    loss,
                    score,
                ]
            )
        last = len(names) + 1
        return Table(header, lines, caption=self.head(), notes=self.notes(), numbers=(*range(1, last), last, last + 1))

    def head(self) -> str:
        """Returns what the sweep is, and how it stands."""
        status = self.status()
        done = sum(is_evaluated(run) and is_trained(run) for run in self.runs if run.exists())
        text = f"{self.folder.name}: {len(self.file.members)} runs of {self.file.run}, {done} done"
        if status.state == "new":
            return f"{text}; not started"
        used = f", {duration(status.used_s)} used"
        budget = f" of {self.file.budget_hours:g} h" if self.file.budget_hours is not None else ""
        why = f" ({status.exit_reason})" if status.exit_reason and not status.is_live else ""
        return f"{text}; {status.state}{why}{used}{budget}"

    def notes(self) -> list[str]:
        """Returns what all runs take together before they start, and the order of those that are done."""
        found = []
        if self.costs and self.status().state == "new":
            time = "time not known" if self.seconds is None else f"about {duration(self.seconds)} of training"
            price = "price not known (train.usd_per_hour)" if self.usd is None else f"${self.usd:,.2f}"
            found.append(f"All together: {time} on {self.costs[0].machine}, {price}; evaluating each run comes on top.")
            found += self._budget_note()
        if sum(is_evaluated(run) for run in self.runs if run.exists()) > 1:
            found += self.ranking().sentences()
        return found

    def _budget_note(self) -> list[str]:
        hours = self.file.budget_hours
        if hours is None:
            return ["No budget is set: the runs train until all are done."]
        if self.seconds is not None and self.seconds > 3600 * hours:
            return [f"The budget of {hours:g} h is less than that: the sweep will stop, and can be resumed with more."]
        return [f"The budget is {hours:g} h for all of them, evaluations included."]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        status = self.status()
        return {
            "sweep": self.folder.name,
            "run": self.file.run,
            "state": status.state,
            "exit_reason": status.exit_reason,
            "seconds": status.used_s,
            "budget_hours": self.file.budget_hours,
            "expected_seconds": self.seconds,
            "expected_usd": self.usd,
            "runs": [
                _described(run) | {"settings": member.settings, "exists": run.exists()}
                for run, member in zip(self.runs, self.file.members, strict=True)
            ],
            "ranking": self.ranking().to_dict(),
        }


def _described(run: Run) -> dict[str, Any]:
    return read_row(run.folder).to_dict() if run.exists() else {"run": run.name, "state": "not begun"}


def sweep(
    run: Run | str | os.PathLike[str],
    settings: Mapping[str, Sequence[Any]] | None = None,
    *,
    budget_hours: float | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Sweep:
    """Plans a sweep, or opens one; nothing is written or trained before its `start()`.

    Args:
        run: the run whose other settings all of them share, or, without `settings`, a sweep or the run of one.
        settings: the values of one or two settings, such as `{"adapter.r": [8, 64], "train.learning_rate": [1e-4, 1e-3]}`.
        budget_hours: what all runs together may take, evaluations included; None for no limit.
        root: the folder that holds the runs; None takes `$QLORA_RUNS`, else `runs`.

    Raises:
        ConfigError: a setting or a value is wrong; the message lists all of them.
        UserError: there is no such run or sweep, there are too many settings or runs, or the data can't be read.
    """
    base = run if isinstance(run, Run) else run_at(run, root)
    if settings is None:
        folder = base if (base.folder / SWEEP).exists() else Run(base.folder.parent / f"{base.name[:80]}{SUFFIX}")
        return Sweep(folder, read_sweep(folder))
    if budget_hours is not None and not budget_hours > 0:
        raise UserError("a budget is more than nothing", expected="hours", got=f"{budget_hours:g}")
    config = base.config()
    values, members = members_of(base, settings)
    file = SweepFile(base.name, values, members, budget_hours)
    costs = sweep_costs(config.with_settings(member.settings) for member in members)
    return Sweep(folder_for(base, file), file, base, tuple(costs))
