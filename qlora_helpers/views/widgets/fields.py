"""A control for each setting, made from the configuration's own text, choices and limits.

Choices become buttons or a list, numbers a box to type into, beside a slider where the range is known. What is typed is refused
where it is not a number, never guessed. An optional setting has an 'automatic' state, or is left empty. A field shows its own
error. This module knows nothing of runs, models or consequences.
"""

from __future__ import annotations

import functools
import html
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets

from qlora_helpers.base.config import SECTIONS
from qlora_helpers.base.errors import ConfigError
from qlora_helpers.views.widgets import numbers
from qlora_helpers.views.widgets.panel import add_classes, error_html

Changed = Callable[[], None]
_LABEL = {"description_width": "initial"}
EMPTY_IS_NONE = (
    *("data.prompt", "data.answer", "data.system", "data.column", "data.encoding", "data.separator", "data.sheet"),
    *("data.hub_config", "data.hub_split", "data.revision", "model.revision"),
)
"""Optional texts that are none where nothing is typed; the other optional settings have a check box for it."""


class Field:
    """One setting: its control, its help, its error, and its value in the configuration's terms.

    Args:
        name: `section.key`.
        row: a row of `config.describe`: value, text, choices, low, high.
        changed: called after each change that a person makes.
        options: the names to choose from, for a list of names.

    Attributes:
        box: the widget to show.
        control: the widget that holds the value.
        automatic: the check box that leaves an optional setting to the trainer, or None.
        error: what is wrong with the value, beside it.
    """

    def __init__(self, name: str, row: dict[str, Any], changed: Changed, *, options: Sequence[str] = ()) -> None:
        self.name, self._changed, self._quiet = name, changed, False
        self.kind, self._optional = _kind(name)
        self._lines = bool(row.get("many_lines"))
        self._value = row["value"]
        self.control, parts = _control(name, self.kind, row, options)
        self.automatic = None
        if self._optional and name not in EMPTY_IS_NONE:
            self.automatic = ipywidgets.Checkbox(row["value"] is None, description="automatic", indent=False)
            self.automatic.layout.width, self.automatic.tooltip = "96px", row["text"]
            self.automatic.add_class("qlora-automatic")
            self.automatic.observe(self._on_change, names="value")
            parts = [*parts, self.automatic]
        self.control.tooltip = row["text"]
        line = ipywidgets.HBox(parts, layout={"align_items": "flex-end", "overflow": "visible"})
        help_text = ipywidgets.HTML(f'<div class="qlora-help">{html.escape(row["text"])}</div>')
        self.error = add_classes(ipywidgets.HTML(layout={"display": "none"}), "qlora-field-error")
        self.box = ipywidgets.VBox([line, self.error, help_text], layout={"overflow": "visible"})
        add_classes(self.box, "qlora-field", "qlora-field-" + name.replace(".", "-"))
        self.control.observe(self._on_change, names="value")
        self.show(row["value"])

    @property
    def value(self) -> Any:
        """The value as the configuration takes it; None if the setting is left to the trainer.

        Raises:
            ConfigError: what was typed is not a number.
        """
        if self.automatic is not None and self.automatic.value:
            return None
        if self.control.value == self._shown:
            return self._value  # exact, although the control may round it
        return self._read()

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
            if value is not None or self.automatic is None:
                self._write(value)
            self._shown = self.control.value if value is not None or self.automatic is None else _Nothing
        finally:
            self._quiet = False

    def complain(self, text: str) -> None:
        """Shows what is wrong with the value; an empty text says that all is well."""
        if self.error.value == (shown := error_html(text)):
            return
        self.error.value, self.error.layout.display = shown, "" if text else "none"
        (self.box.add_class if text else self.box.remove_class)("qlora-wrong")

    def _read(self) -> Any:
        value = self.control.value
        if self.kind in (int, float) and isinstance(value, str):
            try:
                return numbers.read(value, self.kind)
            except ValueError as error:
                raise ConfigError([f"{self.name}: {error}"]) from None
        if self.kind is tuple:
            return tuple(value)
        if self.kind is str and self.name in EMPTY_IS_NONE and not value:
            return None
        return value.replace("\\t", "\t") if self.name == "data.separator" else value

    def _write(self, value: Any) -> None:
        if isinstance(self.control, ipywidgets.SelectMultiple):
            self.control.options = list(dict.fromkeys([*self.control.options, *value]))
        if isinstance(self.control, ipywidgets.Text | ipywidgets.Textarea):
            value = "" if value is None else numbers.text(value) if self.kind in (int, float) else value
            value = value.replace("\t", "\\t") if self.name == "data.separator" else value
        self.control.value = value

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
    wide = {"layout": {"flex": "1 1 auto", "width": "auto"}}
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
    elif kind in (int, float):
        return numbers.control(name, kind, row, label)
    elif row.get("many_lines") and name != "data.separator":
        one = ipywidgets.Textarea(continuous_update=False, rows=2, **label, **wide)
    else:
        one = ipywidgets.Text(continuous_update=False, **label, **wide)
    return one, [one]
