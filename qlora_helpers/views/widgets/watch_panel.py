"""A panel that watches a run from its folder alone and passes a person's requests to the trainer.

It reads in a thread and draws on the kernel's own loop, so other cells run meanwhile. It knows no step of a run: it is handed the
function that starts one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.status import Status
from qlora_helpers.views import monitor
from qlora_helpers.views.follow import CURVES, Follower, View
from qlora_helpers.views.widgets import watch_texts
from qlora_helpers.views.widgets.live_charts import LiveChart
from qlora_helpers.views.widgets.panel import Panel, add_classes, error_html, styled, success_html

LIVE_S, QUIET_S = 1.0, 3.0
"""Seconds between two looks at a run while it trains, and while it does not."""
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
    shown = display(panel, display_id=True)
    try:
        yield panel.refresh
    finally:
        panel.refresh()
        shown.update(panel)  # so that the notebook's file holds the curve as it ended


class WatchPanel(Panel):
    """The panel that `watch` returns.

    Attributes:
        box: the widget to show.
        stop_button, save_button, resume_button: the requests that a person can make.
        state, bar, readings, requests, limits, log: the widgets that show the run.
        charts: name -> `LiveChart`.
        view: the last look at the run.
        closed: whether the panel was closed.
    """

    def __init__(self, run: Run, start: Callable[[Run], Any] | None = None, *, buttons: bool = True) -> None:
        self.run, self._start, self._buttons = run, start, buttons
        self._follower = Follower(run)
        self.view = View(run.name, Status(), dict.fromkeys(CURVES, ()))
        self._note = ""  # the result of the last click, if the trainer does not report one
        self._task: asyncio.Task[None] | None = None
        self.closed = False
        self._make_widgets()
        self.refresh()
        with contextlib.suppress(RuntimeError):  # a terminal has no loop and shows what refresh() finds
            self._task = asyncio.get_running_loop().create_task(self._keep_fresh())

    def _make_widgets(self) -> None:
        self.state, self.readings, self.requests, self.limits, self.log = (ipywidgets.HTML() for _ in range(5))
        self.bar = ipywidgets.FloatProgress(
            min=0.0, max=1.0, layout={"width": "100%", "height": "10px", "margin": "2px 0"}
        )
        self.charts = {
            "loss": LiveChart(["training loss", "evaluation loss"], height_px=300),
            "learning_rate": LiveChart(["learning rate"], height_px=84),
            "grad_norm": LiveChart(["gradient norm"], height_px=84),
            "tokens_per_s": LiveChart(["tokens/s"], height_px=84),
        }
        self.stop_button = self._button(
            "Stop and save", "stop", "stop", "Saves after this step and ends, which frees the GPU."
        )
        self.save_button = self._button("Save now", "save", "save", "Saves a checkpoint and continues.")
        self.resume_button = self._button(
            "Resume", "play", "resume", "Continues in a separate process from the newest good checkpoint."
        )
        for widget, name in ((self.state, "qlora-state"), (self.requests, "qlora-requests"), (self.log, "qlora-log")):
            add_classes(widget, name)
        beside = {"flex": "1 1 260px", "min_width": "0", "overflow": "hidden"}
        small = ipywidgets.VBox([self.charts[key].box for key in list(self.charts)[1:]], layout=beside)
        self.charts["loss"].box.layout.flex = "2 1 420px"
        charts = ipywidgets.HBox([self.charts["loss"].box, small])
        add_classes(charts, "qlora-columns")
        buttons = [self.stop_button, self.save_button, self.resume_button, self.requests] if self._buttons else []
        row = add_classes(ipywidgets.HBox(buttons), "qlora-buttons")
        self.box = styled(
            [
                self.state,
                self.bar,
                self.limits,
                charts,
                self.readings,
                row,
                self.log,
            ],
            "qlora-watch",
            "qlora-card",
        )

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
        self.view = view
        status = view.status
        self.state.value = watch_texts.state(view)
        self.bar.value = status.step / status.max_steps if status.max_steps else 0.0
        self.bar.bar_style = {"finished": "success", "failed": "danger", "dead": "danger"}.get(status.state, "")
        self.limits.value = watch_texts.limits(view)
        for key, chart in self.charts.items():
            lines = [view.curves["loss"], view.curves["eval_loss"]] if key == "loss" else [view.curves[key]]
            chart.show(lines, last_step=status.max_steps, generation=view.generation)
        self.readings.value = watch_texts.readings(view) + watch_texts.events_copy(view)
        self.requests.value = self._note or watch_texts.requests(view)
        self.log.value = watch_texts.log(view)
        stopping = any(request.kind == "stop" and request.stage != "answered" for request in view.requests)
        saving = any(request.kind == "save" and request.stage != "answered" for request in view.requests)
        self.stop_button.disabled = not status.is_live or stopping
        self.save_button.disabled = not status.is_live or stopping or saving
        done = status.state == "finished" and not view.settings_changed
        self.resume_button.disabled = status.is_live or self._start is None or done
        self.resume_button.description = "Start" if status.state == "new" else "Resume"

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
        return status

    def close(self) -> None:
        """Closes the panel; the run continues."""
        self.closed = True
        if self._task is not None:
            self._task.cancel()
        _close_all(self.box)

    def still_text(self) -> str:
        """Returns state, readings and curves as text."""
        return f"{monitor.watch_once(self.run)}\n{monitor.loss_curve(self.run)}"

    def still_html(self) -> str:
        """Returns state, readings and a picture of the curves."""
        return monitor.watch_once(self.run)._repr_html_() + monitor.loss_curve(self.run)._repr_html_()


def _close_all(widget: ipywidgets.Widget) -> None:
    """Closes a widget and everything in it; closing only a box leaves the rest in kernel and browser."""
    if widget.comm is None:
        return
    held = [getattr(widget, name) for name in widget.keys]
    widget.close()
    for value in held:
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        for each in values:
            if isinstance(each, ipywidgets.Widget):
                _close_all(each)


def _this_cell() -> str:
    """Returns the id of the notebook cell that is running, or an empty text if Jupyter does not say."""
    try:
        from IPython import get_ipython

        parent = get_ipython().get_parent()
    except (ImportError, AttributeError):
        return ""
    return str(parent.get("metadata", {}).get("cellId") or "")
