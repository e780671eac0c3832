"""What is shown beside a form's controls: the consequences, and where the data are edited a row of them on a page of its own."""

from __future__ import annotations

import ipywidgets

from qlora_helpers.views.widgets.forecast_view import ForecastView
from qlora_helpers.views.widgets.panel import add_classes
from qlora_helpers.views.widgets.preview import RowPreview


class Beside:
    """The consequences and the row.

    Args:
        view: the consequences.
        preview: the row, or None.

    Attributes:
        box: the widget to show.
    """

    def __init__(self, view: ForecastView, preview: RowPreview | None) -> None:
        self._preview = preview
        self.box: ipywidgets.Widget = ipywidgets.VBox([view.box])
        if preview is not None:
            pages = [view.box, preview.box]
            self.box = ipywidgets.Tab(pages, titles=["Consequences", "One row"], selected_index=0)
            self.box.observe(lambda _: self._turned(), names="selected_index")
        self.box.layout = {"flex": "1 1 370px", "min_width": "0"}
        add_classes(self.box, "qlora-beside", "qlora-card")

    def turn_to(self, *, row: bool) -> None:
        """Shows the row, or the consequences."""
        if self._preview is not None:
            self.box.selected_index = int(row)

    def _turned(self) -> None:
        if self._preview is not None and self.box.selected_index == 1:
            self._preview.activate()  # nothing is read before somebody looks
