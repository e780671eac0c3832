"""A panel that watches a run from its folder alone and passes a person's requests to the trainer.

It reads in a thread and draws on the kernel's own loop, so other cells run meanwhile. It knows no step of a run: it takes the
function that starts one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import html
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ipywidgets

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.status import Status
from qlora_helpers.views import monitor
from qlora_helpers.views.follow import CURVES, Follower, View
from qlora_helpers.views.monitor import LossCurve
from qlora_helpers.views.run_plots import draw_run, nothing
from qlora_helpers.views.still_picture import still_picture
from qlora_helpers.views.widgets import watch_texts
from qlora_helpers.views.widgets.live_charts import LiveCharts
from qlora_helpers.views.widgets.panel import GONE, Panel, add_classes, close_all, error_html, styled, success_html
from qlora_helpers.views.widgets.run_log import SHOWN, log_html
from qlora_helpers.views.widgets.step_table import FILTERS, csv_link, step_rows, table_html

LIVE_S, QUIET_S = 1.0, 3.0
"""Seconds between two looks at a run while it trains, and while it does not."""
STILL_EVERY_S, CSV_EVERY_S = 30.0, 60.0
"""Seconds between two updates of the still copy, and of a large file with all steps, while a run trains."""
CSV_AT_ONCE = 1000
"""Rows up to which that file is always up to date."""
_open: dict[str, WatchPanel] = {}  # by the notebook cell that shows it


def watch(run: Run, start: Callable[[Run], Any] | None = None) -> WatchPanel:
    """Shows a live panel for a run: its curves, readings, budget and log, with buttons for its trainer.

    Any number of panels may watch a run from any notebook, before, during and after training. `panel.close()` ends a panel, and so
    does running its cell again.

    Args:
        run: the run to watch; it need not have begun, and may train on another machine that shares the folder.
        start: the function that the Resume button calls, such as `launch.start`; without it the button is disabled.
    """
    cell = _this_cell()
    if cell in _open:
        _open.pop(cell).close()
    panel = WatchPanel(run, start)
    if cell:
        _open[cell] = panel
    return panel


@contextlib.contextmanager
def shown_in_cell(run: Run) -> Iterator[Callable[[], None]]:
    """Shows a panel below the notebook cell that trains in the kernel itself, and yields a function that draws it again.

    The panel has no buttons, because the kernel can't react to them while it trains; interrupting the cell ends the training.
    """
    from IPython.display import display

    panel = WatchPanel(run, buttons=False)
    display(panel)
    try:
        yield panel.refresh
    finally:
        panel.refresh()
        panel.refresh_still()  # so that the notebook's file holds the curve as it ended


class WatchPanel(Panel):
    """The panel that `watch` returns.

    Attributes:
        box: the widget to show.
        stop_button, save_button, resume_button: the requests that a person can make.
        state, bar, readings, requests, limits, steps, log: the widgets that show the run.
        charts: its `LiveCharts`.
        steps_shown, log_shown: which rows and which lines a person chose to see.
        view: the last look at the run.
        closed: whether the panel was closed.
    """

    def __init__(self, run: Run, start: Callable[[Run], Any] | None = None, *, buttons: bool = True) -> None:
        self.run, self._start, self._buttons = run, start, buttons
        self._follower = Follower(run)
        self.view = View(run.name, Status(), dict.fromkeys(CURVES, ()))
        self._note = ""  # the result of the last click, if the trainer does not report one
        self._task: asyncio.Task[None] | None = None
        self._still_at = self._csv_at = float("-inf")
        self._tabled: Any = None
        self.closed = False
        self._make_widgets()
        self.refresh()
        with contextlib.suppress(RuntimeError):  # a terminal has no loop and shows what refresh() finds
            self._task = asyncio.get_running_loop().create_task(self._keep_fresh())

    def _make_widgets(self) -> None:
        self.state, self.bar, self.limits = map(_text, ("state", "bar", "limits"))
        self.readings, self.requests = map(_text, ("readings", "requests"))
        self.steps, self.csv, self.log = map(_text, ("steps", "csv", "log"))
        self.charts = LiveCharts(self._show_steps)
        self.stop_button = self._button(
            "Stop and save", "stop", "stop", "Saves after this step and ends, which frees the GPU."
        )
        self.save_button = self._button("Save now", "save", "save", "Saves a checkpoint and continues.")
        self.resume_button = self._button(
            "Resume", "play", "resume", "Continues in a separate process from the newest good checkpoint."
        )
        self.steps_shown, self.log_shown = _chooser("steps", FILTERS), _chooser("log", SHOWN)
        self.steps_shown.observe(lambda _: self._show_steps(), "value")
        self.log_shown.observe(lambda _: self._show_log(), "value")
        controls = [self.charts.controls] if self._buttons else []  # a kernel that trains can't react to them
        self.box = styled(
            [
                self._row("qlora-top", self.state, *self._request_buttons()),
                self.bar,
                self.requests,
                self.limits,
                *controls,
                self.charts.box,
                self.readings,
                self._row(
                    "qlora-lists",
                    self._list(self.steps_shown, self.csv, self.steps),
                    self._list(self.log_shown, self.log),
                ),
            ],
            "qlora-watch",
            "qlora-card",
            gone=f"{GONE.removesuffix('.')}; the run goes on." if self._buttons else GONE,
        )

    def _request_buttons(self) -> list[ipywidgets.Widget]:
        return [self._row("qlora-buttons", *self._request_widgets())] if self._buttons else []

    def _request_widgets(self) -> tuple[ipywidgets.Button, ...]:
        return self.stop_button, self.save_button, self.resume_button

    def _list(self, chooser: ipywidgets.Widget, *shown: ipywidgets.Widget) -> ipywidgets.Widget:
        head = [self._row("qlora-list-head", chooser, *shown[:-1])] if self._buttons else []
        return add_classes(ipywidgets.VBox([*head, shown[-1]]), "qlora-list")

    def _row(self, name: str, *children: ipywidgets.Widget) -> ipywidgets.Widget:
        return add_classes(ipywidgets.HBox(children), name)

    def _button(self, text: str, icon: str, kind: str, tooltip: str) -> ipywidgets.Button:
        button = ipywidgets.Button(description=text, icon=icon, tooltip=tooltip, layout={"width": "auto"})
        button.add_class(f"qlora-{kind}")
        button.on_click(lambda _: self._request(kind))
        return button

    def _request(self, kind: str) -> None:
        self._note = ""
        try:
            if kind != "resume":
                self.run.request(kind)
            elif self._start is not None:
                self._note = success_html(str(self._start(self.run)))
        except UserError as error:
            self._note = error_html(str(error))
        self.refresh()

    def refresh(self) -> None:
        """Reads the run now and shows it."""
        try:
            self._show(self._follower.look())
        except (UserError, OSError) as error:  # such as a damaged status; the earlier curves stay
            self.state.value = error_html(str(error))

    def _show(self, view: View) -> None:
        before, self.view = self.view, view
        status = view.status
        self.state.value = watch_texts.state(view)
        self.bar.value = watch_texts.progress(view)
        self.limits.value = watch_texts.limits(view)
        self.charts.show(view)
        self.readings.value = watch_texts.readings(view) + watch_texts.events_copy(view)
        self.requests.value = self._note or watch_texts.requests(view)
        self._show_steps()
        self._show_log()
        stopping = any(request.kind == "stop" and request.stage != "answered" for request in view.requests)
        saving = any(request.kind == "save" and request.stage != "answered" for request in view.requests)
        self.stop_button.disabled = not status.is_live or stopping
        self.save_button.disabled = not status.is_live or stopping or saving
        done = status.state == "finished" and not view.settings_changed
        self.resume_button.disabled = status.is_live or self._start is None or done or view.is_gone
        self.resume_button.description = "Start" if status.state == "new" else "Resume"
        if before.status.state != status.state or time.monotonic() - self._still_at > STILL_EVERY_S:
            self._still_at = time.monotonic()
            self.refresh_still()

    def _show_steps(self) -> None:
        """Shows the table; a large file of it is offered anew once a minute, because it holds every row."""
        view, chosen = self.view, (self.steps_shown.value, self.charts.across)
        tabled = (len(view.records), view.generation, view.events, view.status.is_live, *chosen)
        if tabled == self._tabled:
            return
        was, self._tabled = self._tabled, tabled
        rows = step_rows(view, *chosen)
        self.steps.value = table_html(rows)
        is_small = len(rows) <= CSV_AT_ONCE
        if is_small or was is None or was[3:] != tabled[3:] or time.monotonic() - self._csv_at > CSV_EVERY_S:
            self._csv_at = time.monotonic()
            self.csv.value = csv_link(rows, view.name)

    def _show_log(self) -> None:
        self.log.value = log_html(self.view.log, self.log_shown.value)

    async def _keep_fresh(self) -> None:
        while not self.closed:
            try:
                view = await asyncio.to_thread(self._follower.look)
                if not self.closed:
                    if view.status.is_live != self.view.status.is_live:
                        self._note = ""
                    self._show(view)
            except (UserError, OSError) as error:
                self.state.value = error_html(str(error))
            except Exception as error:  # this is the top of the task, where nobody else would see the error
                self.state.value = error_html(f"{type(error).__name__}: {error}")
            await asyncio.sleep(LIVE_S if self.view.status.is_live else QUIET_S)

    async def wait(self, *, step: int | None = None, timeout_s: float = 600.0) -> Status:
        """Waits, with `await` in a cell, until the run has done a step or its session has ended; the panel stays live.

        Args:
            step: the step to wait for; None waits for the end.
            timeout_s: the longest wait, in seconds.

        Returns:
            The run's status then.

        Raises:
            RunError: the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while (status := self.run.status()).is_live and (step is None or status.step < step):
            if time.monotonic() > deadline:
                raise RunError(f"the run {self.run.name!r} is still {status.state} after {timeout_s:g} s")
            await asyncio.sleep(0.1)
        self.refresh()
        self.refresh_still(always=True)
        return status

    def close(self) -> None:
        """Closes the panel; the run continues."""
        self.closed = True
        if self._task is not None:
            self._task.cancel()
        for widget in (
            self.box,
            self.charts.controls,
            self.steps_shown,
            self.log_shown,
            self.csv,
            *self._request_widgets(),
        ):
            close_all(widget)

    def still_text(self) -> str:
        """Returns state, readings and curves as text."""
        return f"{self._watch()}\n{LossCurve(self.view.name, self.view.curves['loss'], self.view.curves['eval_loss'])}"

    def still_html(self) -> str:
        """Returns state, readings and a picture of the curves, and when that was where the run goes on."""
        status = self.view.status
        moment = time.strftime("%H:%M UTC on %d %B %Y", time.gmtime(status.heartbeat))
        note = f"<p>As of {moment}. Run this cell for the live panel.</p>" if status.is_live else ""
        curves = still_picture(list(draw_run(self.view).values()), self.view.name)
        state = dataclasses.replace(self._watch(), seconds_silent=None)._repr_html_()
        return state + (curves or f"<p>{html.escape(nothing(self.view))}</p>") + note

    def _watch(self) -> monitor.Watch:
        return monitor.watch_of(self.view)


def _text(name: str) -> ipywidgets.HTML:
    return add_classes(ipywidgets.HTML(), f"qlora-{name}")


def _chooser(name: str, options: Iterable[str]) -> ipywidgets.Dropdown:
    found = ipywidgets.Dropdown(options=list(options), description=name, layout={"width": "auto"})
    found.style.description_width = "initial"
    return found


def _this_cell() -> str:
    """Returns the id of the notebook cell that is running, or an empty text if Jupyter does not say."""
    try:
        from IPython import get_ipython

        parent = get_ipython().get_parent()
    except (ImportError, AttributeError):
        return ""
    return str(parent.get("metadata", {}).get("cellId") or "")
