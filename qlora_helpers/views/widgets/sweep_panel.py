"""A small form for a sweep: several values of up to two settings, the plan with memory, time and price, and a start button.

It plans and starts through `views.sweep`, and edits no other setting: the run that the sweep begins with has a form of its own.
"""

from __future__ import annotations

from typing import Any

import ipywidgets

from qlora_helpers.base.config import SECTIONS, describe
from qlora_helpers.base.errors import UserError
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.sweep_file import MOST_SETTINGS
from qlora_helpers.views.sweep import Sweep, sweep
from qlora_helpers.views.widgets.panel import Panel, add_classes, button, error_html, styled, success_html

FIRST = (
    *("adapter.r", "adapter.lora_alpha", "adapter.lora_dropout", "train.learning_rate", "train.epochs"),
    *("train.micro_batch_size", "train.gradient_accumulation_steps", "train.lr_scheduler_type", "data.train_rows"),
)
"""The settings that come first in the choice; the others follow in their order."""
NOTHING = "(none)"


def sweep_form(run: Run) -> SweepForm:
    """Shows a form that plans and starts a sweep of a run.

    Args:
        run: an existing run, whose other settings all runs of the sweep share.

    Raises:
        RunError: the run does not exist.
        ConfigError: its settings can't be read.
    """
    run.config()
    return SweepForm(run)


class SweepForm(Panel):
    """What `sweep_form` returns.

    Attributes:
        names, values: a choice of a setting and a field for its values, twice.
        budget: hours for all runs together; empty for no limit.
        skip: whether runs that don't fit are left out.
        sweep: what was planned last; None before that.
        shown, note: the widgets with the plan, and with the result of the last click.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sweep: Sweep | None = None
        every = [f"{section}.{row['name']}" for section, kind in SECTIONS.items() for row in describe(kind)]
        options = [*FIRST, *(name for name in every if name not in FIRST)]
        self.names = [
            ipywidgets.Dropdown(
                options=[NOTHING, *options],
                value=FIRST[0] if not number else NOTHING,
                description=f"Setting {number + 1}",
            )
            for number in range(MOST_SETTINGS)
        ]
        self.values = [ipywidgets.Text(description="Values", placeholder="such as 8, 64") for _ in range(MOST_SETTINGS)]
        self.budget = ipywidgets.Text(description="Budget, h", placeholder="no limit")
        self.shown, self.note = ipywidgets.HTML(), ipywidgets.HTML()
        self.skip = ipywidgets.Checkbox(
            False,
            description="leave out runs that don't fit",
            tooltip="Runs that need more memory than a GPU of this machine has are no part of the sweep",
            indent=False,
            layout={"width": "auto"},
        )
        for control in (*self.names, *self.values, self.budget, self.skip):
            control.observe(lambda _: self._forget(), "value")
        self.plan_button = button("Plan", "Says what all runs take, and starts nothing", self.plan, "primary")
        self.start_button = button("Start", "Trains the runs one after another in the background", self._start)
        self.stop_button = button("Stop and save", "The run that trains saves first", self._stop)
        self.refresh_button = button("Refresh", "Shows the state of the runs", self._show)
        rows: list[ipywidgets.Widget] = [
            ipywidgets.HBox([name, value]) for name, value in zip(self.names, self.values, strict=True)
        ]
        buttons = [self.plan_button, self.start_button, self.stop_button, self.refresh_button]
        for each in (*rows, line := ipywidgets.HBox([self.budget, self.skip, *buttons])):
            add_classes(each, "qlora-buttons")
        self.box = styled([*rows, line, self.note, self.shown], "qlora-card", "qlora-sweep")
        self._forget()

    def settings(self) -> dict[str, list[str]]:
        """Returns the chosen settings with their values, as they were typed."""
        found: dict[str, list[str]] = {}
        for name, value in zip(self.names, self.values, strict=True):
            parts = [part.strip() for part in value.value.split(",") if part.strip()]
            if name.value != NOTHING and parts:
                found.setdefault(name.value, []).extend(parts)
        return found

    def plan(self) -> None:
        """Plans the sweep and shows what it takes."""
        self._tried(self._plan)

    def _plan(self) -> None:
        hours = _hours(self.budget.value)
        self.sweep = sweep(self.run, self.settings(), budget_hours=hours, skip_too_large=self.skip.value)
        self.note.value = ""
        self._show()

    def _start(self) -> None:
        def start() -> None:
            assert self.sweep is not None  # else the button is disabled
            self.sweep.start()
            text = f"{self.sweep.folder.name} runs in the background. From any notebook: ql.sweep({self.sweep.folder.name!r})"
            self.note.value = success_html(text)
            self._show()

        self._tried(start)

    def _stop(self) -> None:
        def stop() -> None:
            assert self.sweep is not None
            self.sweep.stop()
            self.note.value = success_html("It was asked to stop: the run that trains saves first.")

        self._tried(stop)

    def _forget(self) -> None:
        """What was planned no longer fits what is typed."""
        self.sweep, self.shown.value = None, ""
        self.start_button.disabled = self.stop_button.disabled = self.refresh_button.disabled = True

    def _show(self) -> None:
        if self.sweep is None:
            return
        self.shown.value = self.sweep._repr_html_()
        live = self.sweep.status().is_live
        self.start_button.disabled, self.stop_button.disabled = live or bool(self.sweep.too_large), not live
        self.start_button.description = "Start" if self.sweep.status().state == "new" else "Resume"
        self.refresh_button.disabled = False

    def _tried(self, act: Any) -> None:
        try:
            act()
        except (UserError, OSError) as error:
            self.note.value = error_html(str(error))

    def still_text(self) -> str:
        """Returns the plan, or what the form is for."""
        if self.sweep is not None:
            return repr(self.sweep)
        return f"A form that plans a sweep of {self.run.name}: ql.sweep({self.run.name!r}, {{'adapter.r': [8, 64]}}) does the same."


def _hours(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError("the budget is not a number", expected="hours, such as 2.5", got=text) from None
