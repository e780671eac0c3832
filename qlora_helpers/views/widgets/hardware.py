"""The choice of hardware that a form plans for: this machine, or what a person types, with a price of their own.

Owns the words on GPUs that are there or missing. Knows nothing of settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import ipywidgets

from qlora_helpers.base.errors import UserError
from qlora_helpers.machine.hardware import GPUS, INSTANCES, Hardware, parse_gpus
from qlora_helpers.planning.run_plan import this_machine
from qlora_helpers.views.widgets.panel import wrong

THIS_MACHINE = "this machine"
_LABEL = {"description_width": "70px"}


class HardwareChoice:
    """A box to type hardware into, and one for its price.

    Args:
        gpus: to begin with, as `parse_gpus` takes it, or `this machine`; None takes this machine, and where it has no GPU what
            `usual` says.
        usual: asked for the hardware to plan for on a machine without a GPU.
        changed: called after a change that is good.

    Attributes:
        box: what is shown.
        hardware: the last that was good.

    Raises:
        UserError: no such hardware, or `this machine` has none.
    """

    def __init__(self, gpus: str | None, usual: Callable[[], Hardware], changed: Callable[[], None]) -> None:
        self._changed = changed
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
            tooltip="To plan for: this machine, 4x24GiB, 2xL4, H100, ml.g5.12xlarge",
        )
        self.price = ipywidgets.Text(
            placeholder="catalogue's",
            description="$ an hour",
            continuous_update=False,
            style=_LABEL,
            tooltip="Price of all of it; empty takes the catalogue's",
            layout={"width": "170px"},
        )
        self.message = ipywidgets.HTML()
        for each, name in ((self.name, "qlora-hardware"), (self.price, "qlora-price")):
            each.add_class(name)
            each.observe(lambda _: self._heard(), names="value")
        row = ipywidgets.HBox([self.name, self.price], layout={"flex_flow": "row wrap"})
        self.box = ipywidgets.VBox([row, self.message])

    def notes(self) -> list[str]:
        """What a reader must know of the choice."""
        if self._machine is not None:
            return []
        return [f"this machine has no GPU: planned for {self.hardware.label}; a CPU takes far longer"]

    def _heard(self) -> None:
        try:
            self.hardware = self._find(self.name.value, _price(self.price.value))
        except UserError as error:
            self.message.value = wrong(f"{error} Still shown: {self.hardware.label}.")
            return
        self.message.value = ""
        self._changed()

    def _find(self, gpus: str, price: float | None = None) -> Hardware:
        if gpus.strip().lower() != THIS_MACHINE:
            return parse_gpus(gpus, price)
        if self._machine is None:
            raise UserError(self._missing, next_step="Name hardware to plan for, such as 4x24GiB or ml.g5.12xlarge.")
        given = {"price_usd_per_hour": price, "price_note": "as given"} if price is not None else {}
        return dataclasses.replace(self._machine, **given) if given else self._machine


def _price(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        price = float(text.strip().lstrip("$"))
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise UserError("that is no price", expected="USD an hour, such as 7.09", got=text)
    return price
