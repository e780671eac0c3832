"""The list of runs as a panel: sort, filter, tick some to compare them, and clone, watch, report or delete one.

What is shown comes from `views.run_list` and `views.run_comparison`, which know no widgets. A run is deleted by `runs.cleanup`, and
only after its exact name was typed.
"""

from __future__ import annotations

import contextlib
import functools
import html
import os
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tables import AS_TEXT
from qlora_helpers.base.text import size_text
from qlora_helpers.runs import launch
from qlora_helpers.runs.cleanup import delete_run
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import clone_run
from qlora_helpers.runs.space import is_sweep
from qlora_helpers.runs.sweep_file import runs_of_sweep
from qlora_helpers.views.report import write_report
from qlora_helpers.views.run_comparison import comparison_of
from qlora_helpers.views.run_list import RunList, expanded, named_runs, read_runs, total_line
from qlora_helpers.views.run_row import BROKEN, COLUMNS, RunRow
from qlora_helpers.views.runs_report import write_runs_report
from qlora_helpers.views.widgets.panel import Panel, add_classes, button, error_html, styled, success_html
from qlora_helpers.views.widgets.watch_panel import WatchPanel

MOST_ROWS = 60  # each is three widgets in the browser
HEADINGS = ("state", "best loss", "score", "minutes", "USD", "size", "date")


def list_runs(root: str | os.PathLike[str] | None = None, *, sort: str | None = None, where: str = "") -> RunListPanel:
    """Lists the runs below a folder; in a notebook they can be sorted, filtered, compared, cloned, watched and deleted.

    A run whose files are damaged is a row that says what is wrong, and does not hide the others.

    Args:
        root: the folder that holds the runs; None takes `$QLORA_RUNS`, else `runs`.
        sort: a column, such as `score`; None takes the names.
        where: words that a run must have, such as `finished r=8`.

    Raises:
        UserError: there is no such column.
    """
    return RunListPanel(root, sort=sort, where=where)


class RunListPanel(Panel):
    """What `list_runs` returns.

    Attributes:
        runs: the runs and sweeps that are shown, in their order; iterating over the panel yields the runs alone.
        ticks: a checkbox by the name of each run that is shown.
        filter, sort, reverse: what decides what is shown.
        note: the result of the last click.
        below: what was opened: a comparison, a panel, a report, or a question.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, *, sort: str | None = None, where: str = "") -> None:
        self.root, self._sort, self._where, self._reverse = root, sort, where, False
        self._ticked: set[str] = set()
        self._watching: WatchPanel | None = None
        self._read()

    def __iter__(self) -> Iterator[RunRow]:
        return (row for row in self.runs if row.sweep is None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def still_text(self) -> str:
        """Returns the table as text."""
        return repr(self.runs)

    def still_html(self) -> str:
        """Returns the table as HTML."""
        return self.runs._repr_html_()

    def _read(self) -> None:
        self._all = read_runs(self.root)
        self._choose()

    def _choose(self) -> None:
        found = self._all if self._sort is None else self._all.sorted_by(self._sort)
        self.runs: RunList = (found.reversed() if self._reverse else found).where(self._where)

    @functools.cached_property
    def box(self) -> ipywidgets.Box:
        """The live widget, made when it is first shown."""
        self.filter = ipywidgets.Text(
            value=self._where, description="Filter", placeholder="such as: finished r=8", continuous_update=False
        )
        self.sort = ipywidgets.Dropdown(options=COLUMNS, value=self._full(self._sort), description="Sort by")
        self.reverse = ipywidgets.ToggleButton(value=False, description="Reverse", layout={"width": "auto"})
        for control in (self.filter, self.sort, self.reverse):
            control.observe(lambda _: self._changed(), "value")
        self.note, self.total, self.head = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML(_heading())
        self.ticks: dict[str, ipywidgets.Checkbox] = {}
        self.table = add_classes(ipywidgets.VBox(), "qlora-runs")
        self.buttons = {
            "compare": button("Compare", "Lays the ticked runs side by side", self._compare, "primary"),
            "report": button("Report", "Writes and opens the report of the ticked runs", self._report),
            "watch": button("Watch", "Opens the panel of the ticked run", self._watch),
            "clone": button("Clone", "Sets up a new run with the ticked run's settings", self._ask_clone),
            "delete": button("Delete", "Deletes the ticked run, after its name was typed", self._ask_delete),
            "refresh": button("Refresh", "Reads the runs again", self.refresh),
        }
        self.below = ipywidgets.VBox(layout={"overflow": "visible"})
        controls = ipywidgets.HBox([self.filter, self.sort, self.reverse])
        actions = ipywidgets.HBox(list(self.buttons.values()))
        rows = [add_classes(controls, "qlora-buttons"), self.table, self.total, add_classes(actions, "qlora-buttons")]
        box = styled([*rows, self.note, self.below], "qlora-card", "qlora-run-list")
        self._show()
        return box

    def _full(self, column: str | None) -> str:
        start = (column or "run").strip().lower()
        return next(name for name in COLUMNS if name.lower().startswith(start))

    def refresh(self) -> None:
        """Reads the runs again and shows them; what is ticked stays ticked."""
        self._read()
        if "box" in self.__dict__:
            self._show()

    def _changed(self) -> None:
        self._where, self._sort, self._reverse = self.filter.value, self.sort.value, self.reverse.value
        self._choose()
        self._show()

    def _show(self) -> None:
        shown = self.runs.rows[:MOST_ROWS]
        names = {row.name for row in self._all}
        self._ticked &= names
        self.ticks = {}
        lines: list[ipywidgets.Widget] = [self.head] if shown else []
        for row in shown:
            tick = ipywidgets.Checkbox(value=row.name in self._ticked, description=row.name, indent=False)
            tick.tooltip, tick.disabled = row.name, row.run is None
            tick.observe(functools.partial(self._tick, row.name), "value")
            self.ticks[row.name] = tick
            lines.append(add_classes(ipywidgets.HBox([tick, ipywidgets.HTML(_line(row))]), "qlora-run"))
        self.table.children = lines
        hidden = len(self._all) - len(shown)
        more = f"; {hidden} not shown" if hidden else ""
        nothing = "No runs yet." if not len(self._all) else "No run fits the filter."
        self.total.value = _quiet(f"{total_line(self._all)}{more}" if shown else nothing)
        self._enable()

    def _tick(self, name: str, change: Any) -> None:
        (self._ticked.add if change["new"] else self._ticked.discard)(name)
        self._enable()

    def _enable(self) -> None:
        rows = self._ticked_rows()
        runs = sum(len(row.sweep.members) if row.sweep else 1 for row in rows)
        self.buttons["compare"].disabled = runs < 2
        self.buttons["report"].disabled = runs < 1
        self.buttons["delete"].disabled = len(rows) != 1
        for name in ("watch", "clone"):  # a sweep has many settings, and a form of its own
            self.buttons[name].disabled = len(rows) != 1 or rows[0].sweep is not None

    def _ticked_rows(self) -> list[RunRow]:
        return [row for row in self.runs if row.name in self._ticked and row.run is not None]

    @property
    def ticked(self) -> list[Run]:
        """The runs and sweeps that are ticked, in the list's order; those that a filter hides don't count."""
        return [row.run for row in self._ticked_rows() if row.run is not None]

    def _open(self, *widgets: ipywidgets.Widget, note: str = "") -> None:
        """Shows something below the list in place of what was there."""
        if self._watching is not None:
            self._watching.close()
            self._watching = None
        self.below.children = widgets
        self.note.value = note

    def _tried(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (UserError, OSError) as error:
            self.note.value = error_html(str(error))

    def _compare(self) -> None:
        def compare() -> None:
            found = comparison_of(named_runs(self.ticked))
            self._open(ipywidgets.HTML(_scrolled(found._repr_html_())))

        self._tried(compare)

    def _report(self) -> None:
        def write() -> None:
            runs = expanded(self.ticked)
            path = write_report(runs[0]) if len(runs) == 1 else write_runs_report(comparison_of(runs))
            page = html.escape(path.read_text(encoding="utf-8"))
            # Nothing in the page may run or reach the notebook, whoever made the run.
            frame = f'<iframe class="qlora-page" sandbox="" title="the report" srcdoc="{page}"></iframe>'
            self._open(ipywidgets.HTML(frame), note=success_html(f"The report is {_near(path)}."))

        self._tried(write)

    def _watch(self) -> None:
        def watch() -> None:
            panel = WatchPanel(self.ticked[0], launch.start)
            self._open(panel.box)
            self._watching = panel

        self._tried(watch)

    def _ask_clone(self) -> None:
        run = self.ticked[0]
        name = ipywidgets.Text(value=f"{run.name}-2", description="New name")

        def clone() -> None:
            made = clone_run(run, name.value.strip())
            self.refresh()
            text = f"{made.name} is set up with the settings of {run.name}. Change them: ql.ConfigForm(ql.open_run({made.name!r}))"
            self._open(note=success_html(text))

        self._ask(name, button("Clone", "Sets it up", lambda: self._tried(clone), "primary"))

    def _ask_delete(self) -> None:
        run = self.ticked[0]
        name = ipywidgets.Text(description="Its name", placeholder=f"type {run.name} to confirm")

        def delete() -> None:
            freed = delete_run(run, name=name.value)
            self.refresh()
            self._open(note=success_html(f"{run.name} is deleted; {size_text(freed)} are free again."))

        going: list[Run] = []
        with contextlib.suppress(UserError):
            going = runs_of_sweep(run) if is_sweep(run) else []
        names = ", ".join(each.name for each in going)
        with_it = f"With the sweep {run.name} go its runs: {names}." if going else ""
        self._ask(
            name, button("Delete for ever", "This can't be undone", lambda: self._tried(delete), "danger"), with_it
        )

    def _ask(self, text: ipywidgets.Text, confirm: ipywidgets.Button, note: str = "") -> None:
        cancel = button("Cancel", "Changes nothing", self._open)
        line = add_classes(ipywidgets.HBox([text, confirm, cancel]), "qlora-buttons")
        self._open(line, note=_quiet(note) if note else "")


def _near(path: os.PathLike[str]) -> str:
    """A path as seen from here, if it is below."""
    found = os.path.relpath(path)
    return os.fspath(path) if found.startswith("..") else found


def _heading() -> str:
    cells = "".join(f"<span>{html.escape(name)}</span>" for name in HEADINGS)
    return f'<div class="qlora-run-cells qlora-run-head"><span>changed settings, data</span>{cells}</div>'


def _line(row: RunRow) -> str:
    cells = dict(zip(COLUMNS, row.cells(), strict=True))
    what = ", ".join(filter(None, [cells["changed settings"], cells["data"]]))
    wrong = ' class="qlora-error"' if row.problem else ""
    state = row.state if row.state.isalpha() else BROKEN
    step = html.escape(row.step)
    badge = f'<span><i class="qlora-badge {state}">{state}</i>{step if not row.problem else ""}</span>'
    rest = "".join(f"<span>{html.escape(cells[name])}</span>" for name in HEADINGS[1:])
    what = f"<span{wrong}>{html.escape(what)}</span>"
    return f'<div {AS_TEXT}><div class="qlora-run-cells">{what}{badge}{rest}</div></div>'


def _quiet(text: str) -> str:
    return f'<span class="muted">{html.escape(text)}</span>'


def _scrolled(text: str) -> str:
    return f'<div class="qlora-scroll" tabindex="0" role="region" aria-label="the comparison">{text}</div>'
