"""A sweep as a person sees it: planned with memory, time and price of its runs, started, followed, stopped, resumed, and ranked.

Reads the sweep's folder and those of its runs; `runs.sweep` trains them in a process of its own. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from qlora_helpers.views.run_row import read_row, value_text

LEAVE_OUT = "Give smaller values, or leave such runs out: skip_too_large=True, or --skip-too-large."


@dataclass(frozen=True, repr=False)
class Sweep(Tabular):
    """Runs that differ in up to two settings, trained one after another under one budget; shows as a table.

    Attributes:
        folder: the sweep's folder, as a `Run`; it need not exist before `start`.
        file: its runs, settings and budget.
        base: the run whose other settings all of them share; None where the sweep was opened by its own name.
        costs: what each run is expected to take; empty where the sweep was opened by its own name.
        skipped: what the runs would take that are left out because they don't fit, by their names.
    """

    folder: Run
    file: SweepFile
    base: Run | None = None
    costs: tuple[TrainingCost, ...] = ()
    skipped: Mapping[str, TrainingCost] = field(default_factory=dict)

    @property
    def too_large(self) -> dict[str, TrainingCost]:
        """The runs that need more memory than a GPU of this machine has, by their names."""
        planned = zip(self.file.members, self.costs, strict=False)  # no costs where it was opened by its own name
        return {member.name: cost for member, cost in planned if cost.is_too_large}

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
            UserError: a run doesn't fit; nothing is written.
        """
        self.write()
        start_sweep(self.folder)
        return self

    resume = start

    def write(self) -> None:
        """Writes the folders of the sweep and of its runs, where it was planned just now.

        Raises:
            RunError: a run of one of the names has other settings.
            UserError: a run doesn't fit; nothing is written.
        """
        if self.too_large:
            raise _too_large(self.too_large, len(self.file.members))
        if self.base is not None:
            make_sweep(self.base, self.file)

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
        """Returns a row for each run, with what it is expected to take, or its state and results."""
        names = list(self.file.settings)
        memory = ["GiB a GPU"] if any(cost.usable_gib is not None for cost in self.costs) else []
        header = ["run", *names, *memory, "about", "USD", "state", "best loss", "score"]
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
                    *([_memory_text(cost)] if cost and memory else []),
                    duration(cost.seconds) if cost and cost.seconds is not None else "",
                    f"{cost.dollars:,.2f}" if cost and cost.dollars is not None else "",
                    row.state + row.step if has_begun else "not begun",
                    loss,
                    score,
                ]
            )
        numbers = range(1, len(names) + len(memory) + 3)  # the settings, memory, time and price
        return Table(header, lines, caption=self.head(), notes=self.notes(), numbers=tuple(numbers))

    def head(self) -> str:
        """Returns what the sweep is, and its state."""
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
            found += [*self._memory_notes(), *self._budget_note()]
        if sum(is_evaluated(run) for run in self.runs if run.exists()) > 1:
            found += self.ranking().sentences()
        return found

    def _memory_notes(self) -> list[str]:
        if all(cost.on_cpu for cost in self.costs):
            return ["There is no GPU to train on, so the plan doesn't say whether the runs fit in memory."]
        found = []
        if self.too_large:
            found.append(f"These don't fit, so the sweep can't start: {_named(self.too_large)}. {LEAVE_OUT}")
        if self.skipped:
            found.append(f"Left out because they don't fit: {_named(self.skipped)}.")
        if any(cost.peak_gib is None for cost in self.costs):
            found.append("Memory and time of this model can't be estimated.")
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
        status, costs = self.status(), self.costs or (None,) * len(self.file.members)
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
                _described(run) | {"settings": member.settings, "exists": run.exists()} | _memory(cost)
                for run, member, cost in zip(self.runs, self.file.members, costs, strict=True)
            ],
            "left_out": [{"run": name} | _memory(cost) for name, cost in self.skipped.items()],
            "ranking": self.ranking().to_dict(),
        }


def _memory(cost: TrainingCost | None) -> dict[str, Any]:
    peak, usable = (cost.peak_gib, cost.usable_gib) if cost else (None, None)
    return {"peak_gib": peak, "usable_gib": usable, "fits": None if peak is None else not (cost and cost.is_too_large)}


def _memory_text(cost: TrainingCost) -> str:
    if cost.peak_gib is None:
        return "not known"
    return f"{cost.peak_gib:.1f} of {cost.usable_gib:.1f}{', too large' if cost.is_too_large else ''}"


def _named(costs: Mapping[str, TrainingCost]) -> str:
    return ", ".join(f"{name} ({_memory_text(cost).partition(',')[0]} GiB)" for name, cost in costs.items())


def _too_large(costs: Mapping[str, TrainingCost], runs: int) -> UserError:
    return UserError(
        f"{len(costs)} of the sweep's {runs} runs {'does' if len(costs) == 1 else 'do'} not fit; nothing was started",
        expected=f"at most {next(iter(costs.values())).usable_gib:.1f} GiB on each GPU",
        got=_named(costs),
        next_step=LEAVE_OUT,
    )


def _described(run: Run) -> dict[str, Any]:
    return read_row(run.folder).to_dict() if run.exists() else {"run": run.name, "state": "not begun"}


def sweep(
    run: Run | str | os.PathLike[str],
    settings: Mapping[str, Sequence[Any]] | None = None,
    *,
    budget_hours: float | None = None,
    skip_too_large: bool = False,
    root: str | os.PathLike[str] | None = None,
) -> Sweep:
    """Plans a sweep, or opens one; nothing is written or trained before its `start()`.

    Args:
        run: the run whose other settings all of them share, or, without `settings`, a sweep or the run of one.
        settings: the values of one or two settings, such as `{"adapter.r": [8, 64], "train.learning_rate": [1e-4, 1e-3]}`.
        budget_hours: what all runs together may take, evaluations included; None for no limit.
        skip_too_large: whether runs that need more memory than a GPU of this machine has are left out; a sweep with such a run
            does not start.
        root: the folder that holds the runs; None takes `$QLORA_RUNS`, else `runs`.

    Raises:
        ConfigError: a setting or a value is wrong; the message lists all of them.
        UserError: there is no such run or sweep, there are too many settings or runs, the data can't be read, or fewer than two
            runs are left.
    """
    base = run if isinstance(run, Run) else run_at(run, root)
    if settings is None:
        folder = base if (base.folder / SWEEP).exists() else Run(base.folder.parent / f"{base.name[:80]}{SUFFIX}")
        return Sweep(folder, read_sweep(folder))
    if budget_hours is not None and not budget_hours > 0:
        raise UserError("a budget is more than nothing", expected="hours", got=f"{budget_hours:g}")
    config = base.config()
    values, members = members_of(base, settings)
    costs = sweep_costs(config.with_settings(member.settings) for member in members)
    planned = list(zip(members, costs, strict=True))
    skipped = {each.name: cost for each, cost in planned if skip_too_large and cost.is_too_large}
    kept = [(each, cost) for each, cost in planned if each.name not in skipped]
    if skipped and len(kept) < 2:
        raise UserError(
            f"{'only one' if kept else 'none'} of the sweep's {len(members)} runs would be left",
            expected="2 or more that fit",
            got=f"too large: {_named(skipped)}",
            next_step="Give smaller values, or change the settings that all runs share.",
        )
    file = SweepFile(base.name, values, tuple(each for each, _ in kept), budget_hours)
    return Sweep(folder_for(base, file), file, base, tuple(cost for _, cost in kept), skipped)
