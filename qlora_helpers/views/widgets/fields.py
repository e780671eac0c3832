"""A control for each setting, made from the configuration's own text, choices and limits.

Choices become buttons or a list, a setting with two limits a slider, and a wide range a number beside a slider over round numbers.
An optional setting has an 'automatic' state. This module knows nothing of runs, models or consequences.
"""

from __future__ import annotations

import functools
import html
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets

from qlora_helpers.base.config import SECTIONS

Changed = Callable[[], None]
STOPS: dict[str, tuple[int, ...]] = {
    "adapter.r": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "adapter.lora_alpha": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "data.seq_len_tokens": (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192),
    "train.micro_batch_size": (1, 2, 4, 8, 16, 32, 64),
    "train.gradient_accumulation_steps": (1, 2, 4, 8, 16, 32, 64),
}
"""The stops of a slider for whole numbers in a wide range; any other number can be typed."""
LOGARITHMIC = ("train.learning_rate",)
_LABEL = {"description_width": "initial"}
START: dict[str, int | float] = {
    "data.train_rows": 100,
    "train.max_steps": 100,
    "train.eval_steps": 10,
    "train.save_steps": 10,
    "model.max_memory_per_gpu_gib": 20.0,
}
"""Where an automatic setting starts when a person switches automatic off; otherwise it starts at the smallest number allowed."""


class Field:
    """One setting: its control, its help, and its value in the configuration's terms.

    Args:
        name: `section.key`.
        row: a row of `config.describe`: value, text, choices, low, high.
        changed: called after each change that a person makes.
        options: the names to choose from, for a list of names.

    Attributes:
        box: the widget to show.
        control: the widget that holds the value.
        automatic: the check box that leaves an optional setting to the trainer, or None.
    """

    def __init__(self, name: str, row: dict[str, Any], changed: Changed, *, options: Sequence[str] = ()) -> None:
        self.name, self._changed, self._quiet = name, changed, False
        kind, optional = _kind(name)
        self._value = row["value"]
        self.control, parts = _control(name, kind, row, options)
        self.automatic = None
        if optional:
            self.automatic = ipywidgets.Checkbox(row["value"] is None, description="automatic", indent=False)
            self.automatic.layout.width, self.automatic.tooltip = "96px", row["text"]
            self.automatic.add_class("qlora-automatic")
            self.automatic.observe(self._on_change, names="value")
            parts = [*parts, self.automatic]
        self.control.tooltip = row["text"]
        line = ipywidgets.HBox(parts, layout={"align_items": "flex-end", "overflow": "visible"})
        help_text = ipywidgets.HTML(f'<div class="qlora-help">{html.escape(row["text"])}</div>')
        self.box = ipywidgets.VBox([line, help_text], layout={"overflow": "visible"})
        self.box.add_class("qlora-field")
        self.box.add_class("qlora-field-" + name.replace(".", "-"))
        self.control.observe(self._on_change, names="value")
        self.show(row["value"])

    @property
    def value(self) -> Any:
        """The value as the configuration takes it; None if the setting is left to the trainer."""
        if self.automatic is not None and self.automatic.value:
            return None
        if self.control.value == self._shown:
            return self._value  # exact, although a slider may round it
        return _read(self.control, _kind(self.name)[0])

    @value.setter
    def value(self, value: Any) -> None:
        self.show(value)
        self._changed()

    def show(self, value: Any) -> None:
        """Puts a value into the control without calling `changed`."""
        self._quiet, self._value = True, value
        try:
            if self.automatic is not None:
                self.automatic.value = value is None
            self.control.disabled = value is None
            if value is not None:
                _write(self.control, value)
            self._shown = self.control.value if value is not None else _Nothing
        finally:
            self._quiet = False

    def _on_change(self, change: dict[str, Any]) -> None:
        if self._quiet:
            return
        if self.automatic is not None:
            self.control.disabled = self.automatic.value
        self._changed()


class _Nothing:
    """A marker that equals no value of a control."""


@functools.cache
def _kind(name: str) -> tuple[type, bool]:
    """Returns the type of a setting, and whether it may be none."""
    section, _, key = name.partition(".")
    hint = typing.get_type_hints(SECTIONS[section])[key]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(each for each in kinds if each is not type(None))
    return (tuple if typing.get_origin(kind) is tuple else kind), type(None) in kinds


def _control(
    name: str, kind: type, row: dict[str, Any], options: Sequence[str]
) -> tuple[ipywidgets.Widget, list[ipywidgets.Widget]]:
    """Returns the widget that holds the value, and all widgets of its line."""
    label = {"description": name.partition(".")[2], "style": _LABEL}
    wide, low, high = {"layout": {"flex": "1 1 auto", "width": "auto"}}, row["low"], row["high"]
    if kind is bool:
        one = ipywidgets.Checkbox(description=label["description"], indent=False, **wide)
    elif row["choices"] and len(row["choices"]) <= 3:
        one = ipywidgets.ToggleButtons(options=row["choices"], **label, layout={"width": "auto"})
        one.style = {"button_width": "auto", **_LABEL}
    elif row["choices"]:
        one = ipywidgets.Dropdown(options=row["choices"], **label, **wide)
    elif kind is tuple:
        names = list(dict.fromkeys([*options, *(row["value"] or ())]))
        one = ipywidgets.SelectMultiple(options=names, value=names, rows=max(2, min(7, len(names))), **label, **wide)
    elif name in STOPS:
        return _number_and_slider(STOPS[name], label)
    elif name in LOGARITHMIC:
        limits = {"min": math.floor(math.log10(low)), "max": math.ceil(math.log10(high))}
        one = ipywidgets.FloatLogSlider(**limits, step=0.05, readout_format=".1e", **label, **wide)
    elif kind is float and low is not None and high is not None and high <= 10:
        one = ipywidgets.FloatSlider(min=low, max=high, step=0.01, readout_format=".2f", **label, **wide)
    elif kind is int and high is not None and high <= 100:
        one = ipywidgets.IntSlider(min=low, max=high, **label, **wide)
    elif kind in (int, float):
        kinds = {int: ipywidgets.IntText, float: ipywidgets.FloatText}
        start = row["value"] if row["value"] is not None else START.get(name, low or 0)
        one = kinds[kind](start, **label, layout={"width": "200px"})
    else:
        one = ipywidgets.Text(continuous_update=False, **label, **wide)
    return one, [one]


def _number_and_slider(
    stops: Sequence[int], label: dict[str, Any]
) -> tuple[ipywidgets.Widget, list[ipywidgets.Widget]]:
    """Returns a number to type, and that number with a slider that moves from one round number to the next."""
    number = ipywidgets.IntText(**label, layout={"width": "100px", "flex": "0 0 auto", "overflow": "visible"})
    slider = ipywidgets.IntSlider(max=len(stops) - 1, readout=False, layout={"flex": "1 1 auto", "width": "auto"})
    quiet = False

    def nearest(value: int) -> int:
        return min(range(len(stops)), key=lambda index: abs(math.log2(stops[index]) - math.log2(max(1, value))))

    def on_number(change: dict[str, Any]) -> None:
        nonlocal quiet
        quiet = True
        slider.value = nearest(change["new"])
        quiet = False

    def on_slider(change: dict[str, Any]) -> None:
        if not quiet:
            number.value = stops[change["new"]]

    number.observe(on_number, names="value")
    slider.observe(on_slider, names="value")
    number.observe(lambda change: setattr(slider, "disabled", change["new"]), names="disabled")
    return number, [number, slider]


def _read(control: ipywidgets.Widget, kind: type) -> Any:
    if isinstance(control, ipywidgets.FloatLogSlider):
        return float(f"{control.value:.2g}")
    if isinstance(control, ipywidgets.FloatSlider):
        return float(f"{control.value:.6g}")
    return tuple(control.value) if kind is tuple else control.value


def _write(control: ipywidgets.Widget, value: Any) -> None:
    if isinstance(control, ipywidgets.SelectMultiple):
        control.options = list(dict.fromkeys([*control.options, *value]))
    control.value = value
