"""Two runs or more side by side: their loss curves over one another, and settings and scores as tables of differences.

Reads run folders alone, knows no widgets and no model, and imports no torch. A file that can't be read costs its own part.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tables import Table
from qlora_helpers.evaluation.evaluation_file import read_evaluation
from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.ranking import Ranking, rank
from qlora_helpers.evaluation.result import score_text, score_value, scoring_from_dict
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.plan_file import PlanFile, read_plan
from qlora_helpers.views.charts import Chart, Panel, number_text
from qlora_helpers.views.readings import points_of
from qlora_helpers.views.run_list import named_runs
from qlora_helpers.views.run_row import RunRow, read_row, value_text


@dataclass(frozen=True)
class RunComparison:
    """Several runs side by side; prints as tables, and shows with their curves in a notebook.

    Attributes:
        rows: what a list shows of each run.
        evaluations: the values of each `evaluation.json`, by the run's name; empty where there is none.
        plans: what each `plan.json` holds.
        chart: evaluation and training losses over one another.
        ranking: by the measure that counts.
    """

    rows: tuple[RunRow, ...]
    evaluations: dict[str, dict[str, Any]]
    plans: dict[str, PlanFile]
    chart: Chart
    ranking: Ranking

    @property
    def names(self) -> list[str]:
        """The runs' names, in the order of the tables."""
        return list(self.evaluations)

    def results(self) -> Table:
        """Returns a column for each run: state, losses, scores, time, price and memory."""
        main = {scoring_from_dict(values.get("scoring", {})).main for values in self.evaluations.values() if values}
        lines = [
            ("state", [row.state + row.step for row in self.rows]),
            ("best evaluation loss", [_loss(row) for row in self.rows]),
            *((measure_of(key).label, [self._score(name, key) for name in self.names]) for key in sorted(main)),
            ("stops", [self._share(name) for name in self.names]),
            ("minutes", [f"{row.status.used_s / 60:.1f}" if row.status.used_s else "" for row in self.rows]),
            ("USD", ["" if row.status.used_usd is None else f"{row.status.used_usd:.2f}" for row in self.rows]),
            ("tokens/s", [self._measured(name, "tokens_per_s") for name in self.names]),
            ("peak memory, GiB", [self._measured(name, "peak_gib") for name in self.names]),
            ("machine", [self._measured(name, "machine") for name in self.names]),
            ("what is wrong", [row.problem for row in self.rows]),
        ]
        shown = [[name, *cells] for name, cells in lines if any(cells)]
        return Table(["", *self.names], shown, caption="results")

    def settings(self) -> Table:
        """Returns a column for each run and a row for each setting that is not the same in all of them."""
        lines = self.setting_differences()
        shown = [[name, *map(value_text, values)] for name, values in lines.items()]
        if not shown:
            return Table((), (), caption="All settings are the same.")
        return Table(["setting", *self.names], shown, caption="settings that differ")

    def setting_differences(self) -> dict[str, list[Any]]:
        """Returns the settings that are not the same in all runs, with each run's value; None where it can't be read."""
        flat = [_flat(row) for row in self.rows]
        names = next((list(each) for each in flat if each), [])
        found = {name: [each.get(name) for each in flat] for name in names}
        return {name: values for name, values in found.items() if any(value != values[0] for value in values)}

    def _score(self, name: str, key: str) -> str:
        values = self.evaluations[name]
        tuned = values.get("scores", {}).get("tuned", {})
        value = score_value(tuned, key)
        if value is None or values.get("random_weights"):
            return "random weights" if value is not None else ""
        low, high = tuned.get("low"), tuned.get("high")
        main = scoring_from_dict(values.get("scoring", {})).main
        known = low is not None and high is not None and key == main
        between = f" ({score_text(low, key)} to {score_text(high, key)})" if known else ""
        return score_text(value, key) + between

    def _share(self, name: str) -> str:
        share = self.evaluations[name].get("scores", {}).get("tuned", {}).get("stop_rate")
        return "" if share is None else f"{share:.0%}"

    def _measured(self, name: str, key: str) -> str:
        measured = self.plans[name].measured
        if measured is None:
            return ""
        if key == "peak_gib":
            return f"{max(measured.peak_gib.values(), default=0):.2f}"
        value = getattr(measured, key)
        return f"{value:,.0f}" if isinstance(value, float) else str(value)

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self._parts()))

    def _repr_html_(self) -> str:
        *tables, chart = self._parts()
        return "".join(part._repr_html_() for part in (chart, *tables))

    def _parts(self) -> list[Any]:
        return [self.results(), self.settings(), self.ranking, self.chart]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "runs": [row.to_dict() for row in self.rows],
            "settings": {
                name: dict(zip(self.names, values, strict=True)) for name, values in self.setting_differences().items()
            },
            "ranking": self.ranking.to_dict(),
        }


def compare_runs(*runs: str | os.PathLike[str] | Run, root: str | os.PathLike[str] | None = None) -> RunComparison:
    """Compares two runs or more: their curves, what differs in their settings, their scores, and which can't be told apart.

    Args:
        runs: names below `root`, paths, or runs.
        root: the folder that holds the runs; None takes `$QLORA_RUNS`, else `runs`.

    Raises:
        UserError: one of them does not exist, or there are fewer than two.
    """
    return comparison_of(named_runs(runs, root=root))


def comparison_of(runs: Sequence[Run]) -> RunComparison:
    """Compares runs that exist."""
    names = _unique([run.name for run in runs])
    evaluations: dict[str, dict[str, Any]] = {}
    plans: dict[str, PlanFile] = {}
    for name, run in zip(names, runs, strict=True):
        evaluations[name], plans[name] = {}, PlanFile()
        with contextlib.suppress(UserError, OSError):  # its row says what is wrong
            evaluations[name] = read_evaluation(run)
        with contextlib.suppress(UserError, OSError):
            plans[name] = read_plan(run)
    rows = tuple(read_row(run.folder) for run in runs)
    return RunComparison(rows, evaluations, plans, _curves(dict(zip(names, runs, strict=True))), rank(evaluations))


def _curves(runs: dict[str, Run]) -> Chart:
    records: dict[str, list[dict[str, Any]]] = {}
    for name, run in runs.items():
        records[name] = []
        with contextlib.suppress(UserError, OSError):
            records[name] = run.progress()
    panels = [
        Panel(
            f"{title}, nats per token",
            {f"{name}, {title}": points_of(found, key) for name, found in records.items()},
            {f"{name}, {title}": name for name in records},
        )
        for title, key in (("evaluation loss", "eval_loss"), ("training loss", "loss"))
    ]
    return Chart(" and ".join(runs), panels, columns=2)


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with a number where two runs of different folders have the same."""
    return [
        name if names[:place].count(name) == 0 else f"{name} ({names[:place].count(name) + 1})"
        for place, name in enumerate(names)
    ]


def _loss(row: RunRow) -> str:
    return "" if row.best_loss is None else f"{number_text(row.best_loss)} at step {row.best_step}"


def _flat(row: RunRow) -> dict[str, Any]:
    sections = row.config.to_dict() if row.config else {}
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
