"""A form for a run's settings: turn a knob, and see at once what it costs and whether it fits.

Edits a copy of the run's configuration until it is saved. Texts, choices and limits are `config`'s, figures `planning.outlook`'s.
Imports no torch and loads no model.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ipywidgets

from qlora_helpers.catalog import GPUS, INSTANCES, Hardware, parse_gpus
from qlora_helpers.config import SECTIONS, RunConfig, describe
from qlora_helpers.errors import ConfigError, UserError
from qlora_helpers.model_sizes import model_sizes
from qlora_helpers.outlook import Outlook
from qlora_helpers.plan import cheapest_instance
from qlora_helpers.planning import UNKNOWN_TOKENS, outlook, this_machine, trained_share
from qlora_helpers.run import Run
from qlora_helpers.shape_lookup import find_shape
from qlora_helpers.tables import Table, settings_table
from qlora_helpers.widgets import consequences as say
from qlora_helpers.widgets.fields import Field
from qlora_helpers.widgets.panel import Panel, copyable, said, styled, wrong
from qlora_helpers.widgets.settings_code import differences, settings_code, settings_command

BASIC: dict[str, tuple[str, ...]] = {
    "adapter": ("r", "lora_alpha", "lora_dropout", "target_modules"),
    "data": ("source", "seq_len_tokens", "packing", "template", "train_rows"),
    "train": (
        "learning_rate", "epochs", "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "optim",
    ),
}  # fmt: skip
"""What matters first; the rest of a section stands under 'more'."""
TITLES = {"adapter": "Adapter", "data": "Data", "train": "Training", "model": "Model", "evaluation": "Evaluation"}
THIS_MACHINE = "this machine"
USUAL = "ml.g5.xlarge"  # planned for where there is no GPU, as long as the run can be made to fit on it


class ConfigForm(Panel):
    """Controls for a run's settings, with their consequences beside them.

    Args:
        run: a run with settings (`workflow.open_run` makes one).
        sections: of `adapter`, `data`, `train`, `model`, `evaluation`.
        gpus: the hardware to plan for, as `4x24GiB`, `H100` or `ml.g5.12xlarge`; None takes this machine's GPUs, and where there
            is none `ml.g5.xlarge`, or the cheapest instance on which the run can be made to fit.
        save: what writes the settings; None takes `run.change_config`.

    Attributes:
        config: the settings as they are shown; the last ones without a mistake.
        saved: the settings as the run has them.
        outlook: what `config` leads to, or None where the model can't be planned.
        fields: name -> the control of a setting.

    Raises:
        RunError: the run has no settings yet.
        UserError: no such hardware, or no such section.
    """

    def __init__(
        self,
        run: Run,
        sections: Sequence[str] = ("adapter", "data", "train"),
        gpus: str | None = None,
        *,
        save: Callable[[RunConfig], Any] | None = None,
    ) -> None:
        sections = (sections,) if isinstance(sections, str) else tuple(sections)
        if unknown := [name for name in sections if name not in SECTIONS] or not sections:
            raise UserError("no such section", expected=f"some of {', '.join(SECTIONS)}", got=repr(unknown or sections))
        self.run, self.sections, self._write = run, sections, save or run.change_config
        self.config = self.saved = run.config()
        self.outlook: Outlook | None = None
        self._hidden: dict[str, Any] = {}  # changes of settings that have no control here
        self._busy = False
        self._shapes: dict[tuple[str, str | None], dict[str, Any]] = {}
        self._machine, self._no_gpu = _own_gpus()
        self.hardware = self._first_hardware(gpus)
        self.fields = self._make_fields()
        self.box = self._layout()
        self._refresh()

    # what a person does

    def take(self, settings: Iterable[str]) -> None:
        """Puts settings into the form, as `--set` takes them; nothing is saved.

        Raises:
            ConfigError: one is unknown or wrong; nothing is changed.
        """
        self._show(self.config.with_settings(list(settings)))

    def reset(self) -> None:
        """Throws the changes away: shows what the run has now."""
        try:
            self.saved = self.run.config()
        except UserError as error:
            self._message.value = wrong(str(error))
            return
        self._show(self.saved)

    def save(self) -> bool:
        """Writes what was changed to the run, beside what others changed meanwhile; says so in the form.

        Returns:
            Whether it was written. Where it was not, the form says why and keeps every value.
        """
        changes = differences(self.config, self.saved)
        if self._wrong.value:
            self._message.value = wrong("Not saved: first put right what is marked above, or press Reset.")
            return False
        try:
            config = self.run.config().with_settings({name: value for name, (value, _) in changes.items()})
            self._write(config)
        except UserError as error:
            self._message.value = wrong(f"Not saved. {error}")
            return False
        self.saved = config
        self._show(config)
        later = " A trainer is running: they count from its next start." if self.run.status().state == "running" else ""
        self._message.value = said(
            f"Saved to {self.run.name}: {_change_text(changes) or 'nothing was changed'}.{later}"
        )
        return True

    def set_hardware(self, gpus: str, price: float | None = None) -> None:
        """Plans for other hardware.

        Raises:
            UserError: it is not known, or this machine has no GPU.
        """
        if gpus.strip().lower() == THIS_MACHINE:
            if self._machine is None:
                raise UserError(self._no_gpu, next_step="Name hardware to plan for, such as 4x24GiB or ml.g5.12xlarge.")
            given = {"price_usd_per_hour": price, "price_note": "as given"} if price is not None else {}
            self.hardware = dataclasses.replace(self._machine, **given)
        else:
            self.hardware = parse_gpus(gpus, price)
        self._refresh()

    # what it looks like

    def _make_fields(self) -> dict[str, Field]:
        fields = {}
        for section in self.sections:
            for row in describe(getattr(self.config, section)):
                name = f"{section}.{row['name']}"
                options = self._layer_names() if name == "adapter.target_modules" else ()
                fields[name] = Field(name, row, self._changed, options=options)
        return fields

    def _layout(self) -> ipywidgets.VBox:
        self._wrong, self._message, self._figures = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._verdict, self._plan, self._notes = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._code = ipywidgets.HTML()
        self._code.add_class("qlora-code")
        self._mend_button = _button("Mend it", "Takes the smallest change that fits", self._take_mend)
        self._plan_button = _button("Take the plan's settings", "The fastest settings that fit", self._take_plan)
        self._save_button = _button("Save", f"Writes the settings to the run {self.run.name}", self.save, "primary")
        self._save_button.add_class("qlora-save-config")
        reset = _button("Reset", "Shows what the run has now; changes are lost", self.reset)
        reset.add_class("qlora-reset")
        self._consequences = ipywidgets.VBox(
            [
                self._hardware_row(), self._figures, self._verdict, self._mend_button, self._plan, self._plan_button,
                self._notes,
            ],
            layout={"flex": "1 1 430px", "min_width": "0"},
        )  # fmt: skip
        controls = ipywidgets.VBox(
            [self._section_tabs(), self._wrong, ipywidgets.HBox([self._save_button, reset]), self._message],
            layout={"flex": "1 1 470px", "min_width": "0"},
        )
        for each, name in ((self._consequences, "qlora-consequences"), (controls, "qlora-controls")):
            each.add_class(name)
            each.add_class("qlora-card")
        columns = ipywidgets.HBox([controls, self._consequences])
        columns.add_class("qlora-columns")
        return styled([columns, self._code], "qlora-form")

    def _section_tabs(self) -> ipywidgets.Widget:
        pages = []
        for section in self.sections:
            names = [name for name in self.fields if name.startswith(f"{section}.")]
            first = [f"{section}.{key}" for key in BASIC.get(section, ())] or names
            rest = [name for name in names if name not in first]
            page = [self.fields[name].box for name in first]
            if rest:
                more = ipywidgets.Accordion([ipywidgets.VBox([self.fields[name].box for name in rest])])
                more.titles, more.selected_index = ("more",), None
                more.add_class("qlora-more")
                page.append(more)
            pages.append(ipywidgets.VBox(page, layout={"overflow": "visible"}))
        if len(pages) == 1:
            return pages[0]
        return ipywidgets.Tab(pages, titles=[TITLES[section] for section in self.sections], selected_index=0)

    def _hardware_row(self) -> ipywidgets.Widget:
        names = ([THIS_MACHINE] if self._machine else []) + [*GPUS, "4x24GiB", *INSTANCES]
        self._hardware_box = ipywidgets.Combobox(
            value=THIS_MACHINE if self.hardware is self._machine else self.hardware.label, options=names,
            description="hardware", continuous_update=False, style={"description_width": "70px"},
            tooltip="To plan for: this machine, 4x24GiB, 2xL4, H100, ml.g5.12xlarge", layout={"width": "270px"},
        )  # fmt: skip
        self._price_box = ipywidgets.Text(
            placeholder="catalogue's", description="$ an hour", continuous_update=False,
            style={"description_width": "70px"}, tooltip="Price of all of it; empty takes the catalogue's",
            layout={"width": "170px"},
        )  # fmt: skip
        self._hardware_wrong = ipywidgets.HTML()
        for each, name in ((self._hardware_box, "qlora-hardware"), (self._price_box, "qlora-price")):
            each.add_class(name)
            each.observe(self._hardware_heard, names="value")
        row = ipywidgets.HBox([self._hardware_box, self._price_box], layout={"flex_flow": "row wrap"})
        return ipywidgets.VBox([row, self._hardware_wrong])

    # what happens

    def _hardware_heard(self, _: Any) -> None:
        if self._busy:
            return
        try:
            price = _price(self._price_box.value)
            self.set_hardware(self._hardware_box.value, price)
            self._hardware_wrong.value = ""
        except UserError as error:
            self._hardware_wrong.value = wrong(f"{error} Still shown: {self.hardware.label}.")

    def _changed(self) -> None:
        """A control was moved: takes the values if they are good together, else says what is wrong and keeps the last good ones."""
        if self._busy:
            return
        try:
            values = {name: field.value for name, field in self.fields.items()}
            config = self.saved.with_settings(self._hidden | values)
            found = self._look(config)
        except ConfigError as error:
            self._wrong.value = wrong(
                "\n".join(error.problems) + "\nShown beside: the last settings without a mistake."
            )
            return
        except UserError as error:
            self._wrong.value = wrong(f"{error}\nShown beside: the last settings without a mistake.")
            return
        self.config, self.outlook = config, found
        self._draw()

    def _show(self, config: RunConfig) -> None:
        """Puts whole settings into the controls."""
        self._hidden = {
            name: value for name, (value, _) in differences(config, self.saved).items() if name not in self.fields
        }
        self._busy = True
        for name, field in self.fields.items():
            section, _, key = name.partition(".")
            field.show(getattr(getattr(config, section), key))
        self._busy = False
        self._changed()

    def _refresh(self) -> None:
        """Works the consequences of the settings out again."""
        try:
            self.outlook = self._look(self.config)
        except UserError as error:  # the run's own settings are never refused here
            self.outlook = None
            self._notes.value = wrong(str(error))
        self._draw()

    def _look(self, config: RunConfig) -> Outlook | None:
        shape = self._shape(config)
        return None if shape is None else outlook(config, hardware=self.hardware, shape=shape)

    def _shape(self, config: RunConfig) -> dict[str, Any] | None:
        """The model's `config.json`, asked for once; None where it can't be had: settings can be edited all the same."""
        key = config.model.name, config.model.revision
        if key not in self._shapes:
            try:
                self._shapes[key] = find_shape(config.model)
                self._no_shape = ""
            except UserError as error:
                self._shapes[key], self._no_shape = None, str(error)
        return self._shapes[key]

    def _draw(self) -> None:
        found, self._wrong.value = self.outlook, ""
        self._code.value = copyable("in a notebook", settings_code(self.run, self.config, self.saved)) + copyable(
            "in a terminal", settings_command(self.run, self.config, self.saved)
        )
        changes = differences(self.config, self.saved)
        text = f"Not saved yet: {_change_text(changes)}" if changes else ""
        self._message.value = f'<div class="muted" role="status">{html.escape(text)}</div>'
        self._mend_button.layout.display = self._plan_button.layout.display = "none"
        if found is None:
            self._figures.value = self._verdict.value = self._plan.value = ""
            self._notes.value = self._notes.value or wrong(f"No consequences can be shown: {self._no_shape}")
            return
        self._figures.value = say.consequences_html(found)
        text = say.verdict(found)
        self._verdict.value = said(text) if found.fits else wrong(text[0].upper() + text[1:])
        self._plan.value = f"<div>{html.escape(say.plan_text(found))}</div>"
        self._mend_button.layout.display = None if any(mend.settings for mend in found.mends) else "none"
        self._plan_button.layout.display = None if found.plan_is_faster else "none"
        self._notes.value = say.notes_html(found, *self._own_notes())

    def _own_notes(self) -> list[str]:
        if self._machine is None:
            return [
                f"this machine has no GPU: planned for {self.hardware.label}; on a CPU expect hours for models of billions"
            ]
        return []

    def _take_mend(self) -> None:
        mend = next((each for each in self.outlook.mends if each.settings), None) if self.outlook else None
        if mend:
            self.take(mend.settings)

    def _take_plan(self) -> None:
        if self.outlook and self.outlook.plan.choice:
            self.take(self.outlook.plan.choice.settings)

    def _layer_names(self) -> list[str]:
        try:
            return [layer.name for layer in model_sizes(self._shape(self.config) or {}).linears]
        except UserError:
            return []

    def _first_hardware(self, gpus: str | None) -> Hardware:
        if gpus is not None and gpus.strip().lower() != THIS_MACHINE:
            return parse_gpus(gpus)
        if self._machine is not None:
            return self._machine
        usual, shape = parse_gpus(USUAL), self._shape(self.config)
        try:
            if shape is None or outlook(self.config, hardware=usual, shape=shape).plan.fits:
                return usual
            share = trained_share(self.config.data)
            return cheapest_instance(shape, self.config, UNKNOWN_TOKENS, share) or usual
        except UserError:
            return usual

    # where there are no widgets

    def _tables(self) -> list[Table]:
        tables = [settings_table(getattr(self.config, section)) for section in self.sections]
        for table, section in zip(tables, self.sections, strict=True):
            table.caption = f"{TITLES[section]}: settings of {self.run.name}"
        if self.outlook is not None:
            found = say.consequences_table(self.outlook)
            found.rows += [["note", note] for note in self._own_notes()]
            found.caption = f"What they lead to on {self.hardware.label}"
            tables.append(found)
        return tables

    def still_text(self) -> str:
        """Settings and consequences as tables, and the code that makes them."""
        shown = [f"{table.caption}\n{table!r}" for table in self._tables()]
        return "\n\n".join([*shown, settings_command(self.run, self.config, self.saved)])

    def still_html(self) -> str:
        """The same in HTML."""
        code = f"<pre>{html.escape(settings_command(self.run, self.config, self.saved))}</pre>"
        return "".join(table._repr_html_() for table in self._tables()) + code


def _own_gpus() -> tuple[Hardware | None, str]:
    try:
        return this_machine(), ""
    except UserError as error:
        return None, error.problem


def _price(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        return float(text.strip().lstrip("$"))
    except ValueError:
        raise UserError("the price is no number", expected="USD an hour, such as 7.09", got=text) from None


def _change_text(changes: dict[str, tuple[Any, Any]]) -> str:
    shown = [f"{name} {_plain(old)} → {_plain(new)}" for name, (new, old) in changes.items()]
    return ", ".join(shown)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(value)
    return "automatic" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _button(text: str, tooltip: str, clicked: Callable[[], Any], style: str = "") -> ipywidgets.Button:
    button = ipywidgets.Button(description=text, tooltip=tooltip, button_style=style)
    button.layout.width, button.layout.align_self = "auto", "flex-start"
    button.on_click(lambda _: clicked())
    return button
