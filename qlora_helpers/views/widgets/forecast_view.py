"""The consequences beside a form's controls, with buttons that apply the smallest fix or the plan's settings.

It shows a `Forecast` in the words and bars of `consequences` and decides nothing.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from typing import Any

import ipywidgets

from qlora_helpers.planning.cost import TrainingCost
from qlora_helpers.planning.forecast import Forecast, changed_settings
from qlora_helpers.views.widgets import consequences as say
from qlora_helpers.views.widgets.panel import add_classes, button, error_html, success_html


class ForecastView:
    """What settings lead to.

    Args:
        above: the widget above it, which is the choice of hardware.
        take: called with settings in the form of `--set` when a button is pressed.
        plan_for: called with the name of other hardware when a button is pressed.

    Attributes:
        box: the widget to show.
    """

    def __init__(
        self,
        above: ipywidgets.Widget,
        take: Callable[[Iterable[str]], Any],
        plan_for: Callable[[str], Any],
    ) -> None:
        self._found: Any = None  # a forecast, once there is one
        self.figures, self.verdict = ipywidgets.HTML(), ipywidgets.HTML()
        self.plan, self.notes = ipywidgets.HTML(), ipywidgets.HTML()
        self.fix_button = button("Fix it", "Applies the smallest change that makes it fit", lambda: take(self._fix()))
        self.plan_button = button(
            "Use the plan's settings",
            "Applies the fastest settings that fit",
            lambda: take(self._found.plan.choice.settings),
        )
        self.other_button = button(
            "Plan for a GPU", "Plans for that hardware instead", lambda: plan_for(self._found.hardware.label)
        )
        add_classes(self.fix_button, "qlora-fix")
        add_classes(self.other_button, "qlora-other-hardware")
        add_classes(self.plan_button, "qlora-take-plan")
        self.box = ipywidgets.VBox(
            [
                *(above, self.figures, self.verdict, self.fix_button, self.other_button),
                *(self.plan, self.plan_button, self.notes),
            ],
            layout={"overflow": "visible"},
        )
        add_classes(self.box, "qlora-consequences")

    def show(self, found: Forecast | None, *, cost: TrainingCost | None = None, trouble: str = "") -> None:
        """Draws a forecast.

        Args:
            found: the forecast, or None if there is none.
            cost: on this machine's CPU, if that is planned for; `found` is then for a GPU that would do.
            trouble: why there is no forecast.
        """
        self._found = found
        choice = found.plan.choice if found and found.plan_is_faster and cost is None else None
        takes_plan = choice is not None and bool(changed_settings(found.plan.workload.config, choice.settings))  # type: ignore[union-attr]
        self.fix_button.layout.display = "" if found and cost is None and self._fix() else "none"
        self.plan_button.layout.display = "" if takes_plan else "none"
        self.other_button.layout.display = "" if found and cost is not None else "none"
        if found is None:
            self.figures.value = self.verdict.value = self.plan.value = ""
            self.notes.value = error_html(f"There is no forecast: {trouble}")
            return
        if cost is not None:
            self.figures.value, text = say.cpu_html(found, cost), say.cpu_verdict(cost)
            self.verdict.value = error_html(text) if cost.is_long else success_html(text)
            self.plan.value, self.notes.value = "", say.notes_html(found)
            self.other_button.description = f"Plan for {found.hardware.label}"
            return
        self.figures.value, text = say.consequences_html(found), say.verdict(found)
        self.verdict.value = success_html(text) if found.fits else error_html(text)
        self.plan.value = f"<div>{html.escape(say.plan_text(found))}</div>"
        self.notes.value = say.notes_html(found)

    def _fix(self) -> tuple[str, ...]:
        return next((each.settings for each in self._found.fixes if each.settings), ())
