"""The hardware that a form plans for: this machine, or what a person types, optionally with their own price.

This module knows nothing of settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ipywidgets

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine.hardware import GPUS, INSTANCES, Hardware, parse_gpus
from qlora_helpers.planning.run_plan import this_machine
from qlora_helpers.views.widgets.panel import add_classes, error_html

THIS_MACHINE = "this machine"
_LABEL = {"description_width": "70px"}


class HardwareChoice:
    """A box to type hardware into, and one for its price.

    Args:
        gpus: the first choice, in the form of `parse_gpus` or `this machine`; None takes this machine, or `usual` if it has no GPU.
        usual: returns the hardware to plan for on a machine without a GPU.
        changed: called after a valid change.

    Attributes:
        box: the widget to show.
        hardware: the last valid choice.

    Raises:
        UserError: the hardware is unknown, or this machine was asked for and has no GPU.
    """

    def __init__(self, gpus: str | None, usual: Callable[[], Hardware], changed: Callable[[], None]) -> None:
        self._changed = changed
        self._machine: Hardware | None
        try:
            self._machine, self._missing = this_machine(), ""
        except UserError as error:
            self._machine, self._missing = None, error.problem
        self.hardware = self._find(gpus) if gpus is not None else self._machine or usual()
        names = ([THIS_MACHINE] if self._machine else []) + [*GPUS, "4x24GiB", *INSTANCES]
        self.name = ipywidgets.Combobox(
            value=THIS_MACHINE if self.hardware is self._machine else self.hardware.label,
            options=names,
            description="hardware",
            continuous_update=False,
            style=_LABEL,
            layout={"width": "270px"},
            tooltip="The hardware to plan for, such as this machine, 4x24GiB, 2xL4, H100 or ml.g5.12xlarge",
        )
        self.price = ipywidgets.Text(
            placeholder="list price",
            description="$ per hour",
            continuous_update=False,
            style=_LABEL,
            tooltip="The price of all GPUs together; leave empty for the list price",
            layout={"width": "170px"},
        )
        self.message = ipywidgets.HTML()
        for each, name in ((self.name, "qlora-hardware"), (self.price, "qlora-price")):
            add_classes(each, name)
            each.observe(lambda _: self._on_change(), names="value")
        row = ipywidgets.HBox([self.name, self.price], layout={"flex_flow": "row wrap"})
        self.box = ipywidgets.VBox([row, self.message])

    def notes(self) -> list[str]:
        """Returns what a reader must know about the choice."""
        if self._machine is not None:
            return []
        return [f"this machine has no GPU; the forecast is for {self.hardware.label}, and a CPU takes far longer"]

    def _on_change(self) -> None:
        try:
            self.hardware = self._find(self.name.value, _price(self.price.value))
        except UserError as error:
            self.message.value = error_html(f"{error} The forecast is still for {self.hardware.label}.")
            return
        self.message.value = ""
        self._changed()

    def _find(self, gpus: str, price: float | None = None) -> Hardware:
        if gpus.strip().lower() != THIS_MACHINE:
            return parse_gpus(gpus, price)
        if self._machine is None:
            raise UserError(self._missing, next_step="Name hardware to plan for, such as 4x24GiB or ml.g5.12xlarge.")
        given: dict[str, Any] = {"price_usd_per_hour": price, "price_note": "as given"} if price is not None else {}
        return dataclasses.replace(self._machine, **given) if given else self._machine


def _price(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        price = float(text.strip().lstrip("$"))
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise UserError("this is not a price", expected="USD per hour, such as 7.09", got=text)
    return price
