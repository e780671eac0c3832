"""The consequences beside a form's controls, with buttons that take the smallest mend or the plan's settings.

Shows an `Forecast`; words and bars are `consequences`'. Decides nothing.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ipywidgets

from qlora_helpers.planning.forecast import Forecast
from qlora_helpers.views.widgets import consequences as say
from qlora_helpers.views.widgets.panel import button, said, wrong


class ForecastView:
    """What settings lead to.

    Args:
        above: what stands above it (the choice of hardware).
        take: is given settings, as `--set` takes them, when a button is pressed.

    Attributes:
        box: what is shown.
    """

    def __init__(self, above: ipywidgets.Widget, take: Callable[[Iterable[str]], Any]) -> None:
        self._found: Forecast | None = None
        self.figures, self.verdict = ipywidgets.HTML(), ipywidgets.HTML()
        self.plan, self.notes = ipywidgets.HTML(), ipywidgets.HTML()
        self.fix_button = button("Fix it", "Takes the smallest change that fits", lambda: take(self._fix()))
        self.plan_button = button(
            "Take the plan's settings", "The fastest settings that fit", lambda: take(self._found.plan.choice.settings)
        )
        self.fix_button.add_class("qlora-mend")
        self.plan_button.add_class("qlora-take-plan")
        self.box = ipywidgets.VBox(
            [above, self.figures, self.verdict, self.fix_button, self.plan, self.plan_button, self.notes],
            layout={"flex": "1 1 370px", "min_width": "0"},
        )
        for name in ("qlora-consequences", "qlora-card"):
            self.box.add_class(name)

    def show(
        self, found: Forecast | None, *, takes_plan: bool = False, notes: Sequence[str] = (), trouble: str = ""
    ) -> None:
        """Draws an outlook.

        Args:
            found: it, or None where there is none.
            takes_plan: whether the plan's settings are other ones and worth taking.
            notes: to stand with its own.
            trouble: why there is none.
        """
        self._found = found
        self.fix_button.layout.display = "" if found and self._fix() else "none"
        self.plan_button.layout.display = "" if takes_plan else "none"
        if found is None:
            self.figures.value = self.verdict.value = self.plan.value = ""
            self.notes.value = wrong(f"No consequences can be shown: {trouble}")
            return
        self.figures.value = say.consequences_html(found)
        text = say.verdict(found)
        self.verdict.value = said(text) if found.fits else wrong(text)
        self.plan.value = f"<div>{html.escape(say.plan_text(found))}</div>"
        self.notes.value = say.notes_html(found, *notes)

    def _fix(self) -> tuple[str, ...]:
        return next((each.settings for each in self._found.fixes if each.settings), ())
