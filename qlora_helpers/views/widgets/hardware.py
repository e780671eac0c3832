"""The hardware that a form plans for: this machine, its GPUs or its CPU, or what a person types, optionally with their own price.

This module knows nothing of settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ipywidgets

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine.hardware import GPUS, Hardware, parse_gpus
from qlora_helpers.machine.instances import INSTANCES
from qlora_helpers.planning.run_plan import this_machine
from qlora_helpers.views.widgets.panel import add_classes, error_html

THIS_MACHINE = "this machine"
_LABEL = {"description_width": "70px"}


class HardwareChoice:
    """A box to type hardware into, and one for its price.

    Args:
        gpus: the first choice, in the form of `parse_gpus` or `this machine`; None takes this machine.
        changed: called after a valid change.

    Attributes:
        box: the widget to show.
        hardware: the last valid choice; None for this machine's CPU.
        price: the box for a price.
        usd_per_hour: the price that was typed, or None.

    Raises:
        UserError: the hardware is unknown.
    """

    def __init__(self, gpus: str | None, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._machine: Hardware | None = None
        with contextlib.suppress(UserError):  # it has no GPU
            self._machine = this_machine()
        self.usd_per_hour: float | None = None
        self.hardware = self._find(gpus) if gpus is not None else self._machine
        self.name = ipywidgets.Combobox(
            value=THIS_MACHINE if self.hardware in (None, self._machine) else self.hardware.label,
            options=[THIS_MACHINE, *GPUS, "4x24GiB", *INSTANCES],
            description="hardware",
            continuous_update=False,
            style=_LABEL,
            layout={"width": "270px", "max_width": "100%"},
            tooltip="The hardware to plan for, such as this machine, 4x24GiB, 2xL4, H100 or ml.g5.12xlarge",
        )
        self.price = ipywidgets.Text(
            placeholder="list price",
            description="$ per hour",
            continuous_update=False,
            style=_LABEL,
            tooltip="The price of all GPUs together; leave empty for the list price",
            layout={"width": "170px", "max_width": "100%"},
        )
        self.message = ipywidgets.HTML()
        for each, name in ((self.name, "qlora-hardware"), (self.price, "qlora-price")):
            add_classes(each, name)
            each.observe(lambda _: self._on_change(), names="value")
        row = ipywidgets.HBox([self.name, self.price], layout={"flex_flow": "row wrap"})
        self.box = ipywidgets.VBox([row, self.message])

    @property
    def label(self) -> str:
        """What is planned for, in words."""
        return "this CPU" if self.hardware is None else self.hardware.label

    def choose(self, name: str) -> None:
        """Chooses other hardware, as a person would by typing it."""
        self.name.value = name

    def _on_change(self) -> None:
        try:
            price = _price(self.price.value)
            self.hardware = self._find(self.name.value, price)
        except UserError as error:
            self.message.value = error_html(f"{error} The forecast is still for {self.label}.")
            return
        self.message.value, self.usd_per_hour = "", price
        self._changed()

    def _find(self, gpus: str, price: float | None = None) -> Hardware | None:
        if gpus.strip().lower() != THIS_MACHINE:
            return parse_gpus(gpus, price)
        given: dict[str, Any] = {"price_usd_per_hour": price, "price_note": "as given"} if price is not None else {}
        return dataclasses.replace(self._machine, **given) if given and self._machine else self._machine


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
