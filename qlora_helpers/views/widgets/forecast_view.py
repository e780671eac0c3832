"""The consequences beside a form's controls, with buttons that apply the smallest fix or the plan's settings.

It shows a `Forecast` in the words and bars of `consequences` and decides nothing.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ipywidgets

from qlora_helpers.planning.forecast import Forecast
from qlora_helpers.views.widgets import consequences as say
from qlora_helpers.views.widgets.panel import add_classes, button, error_html, success_html


class ForecastView:
    """What settings lead to.

    Args:
        above: the widget above it, which is the choice of hardware.
        take: called with settings in the form of `--set` when a button is pressed.

    Attributes:
        box: the widget to show.
    """

    def __init__(self, above: ipywidgets.Widget, take: Callable[[Iterable[str]], Any]) -> None:
        self._found: Any = None  # a forecast, once there is one
        self.figures, self.verdict = ipywidgets.HTML(), ipywidgets.HTML()
        self.plan, self.notes = ipywidgets.HTML(), ipywidgets.HTML()
        self.fix_button = button("Fix it", "Applies the smallest change that makes it fit", lambda: take(self._fix()))
        self.plan_button = button(
            "Use the plan's settings",
            "Applies the fastest settings that fit",
            lambda: take(self._found.plan.choice.settings),
        )
        add_classes(self.fix_button, "qlora-fix")
        add_classes(self.plan_button, "qlora-take-plan")
        self.box = ipywidgets.VBox(
            [above, self.figures, self.verdict, self.fix_button, self.plan, self.plan_button, self.notes],
            layout={"flex": "1 1 370px", "min_width": "0"},
        )
        add_classes(self.box, "qlora-consequences", "qlora-card")

    def show(
        self, found: Forecast | None, *, takes_plan: bool = False, notes: Sequence[str] = (), trouble: str = ""
    ) -> None:
        """Draws a forecast.

        Args:
            found: the forecast, or None if there is none.
            takes_plan: whether the plan's settings are different and faster.
            notes: notes to show with the forecast's own.
            trouble: why there is no forecast.
        """
        self._found = found
        self.fix_button.layout.display = "" if found and self._fix() else "none"
        self.plan_button.layout.display = "" if takes_plan else "none"
        if found is None:
            self.figures.value = self.verdict.value = self.plan.value = ""
            self.notes.value = error_html(f"There is no forecast: {trouble}")
            return
        self.figures.value = say.consequences_html(found)
        text = say.verdict(found)
        self.verdict.value = success_html(text) if found.fits else error_html(text)
        self.plan.value = f"<div>{html.escape(say.plan_text(found))}</div>"
        self.notes.value = say.notes_html(found, *notes)

    def _fix(self) -> tuple[str, ...]:
        return next((each.settings for each in self._found.fixes if each.settings), ())
