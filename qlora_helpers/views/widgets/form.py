"""A form for a run's settings: turn a knob, and see at once what it costs and whether it fits.

Edits a copy of the run's configuration until it is saved. Texts, choices and limits are `config`'s, figures `planning.forecast`'s.
Imports no torch and loads no model.
"""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ipywidgets

from qlora_helpers.base.config import SECTIONS, RunConfig, describe
from qlora_helpers.base.errors import ConfigError, UserError
from qlora_helpers.base.tables import Table, settings_table
from qlora_helpers.machine.hardware import Hardware, parse_gpus
from qlora_helpers.model.shapes.lookup import find_shape
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.fixes import cheapest_instance
from qlora_helpers.planning.forecast import Forecast
from qlora_helpers.planning.run_plan import forecast
from qlora_helpers.runs.folder import Run
from qlora_helpers.views.widgets.consequences import consequences_table
from qlora_helpers.views.widgets.fields import STYLE as FIELD_STYLE
from qlora_helpers.views.widgets.fields import Field
from qlora_helpers.views.widgets.forecast_view import ForecastView
from qlora_helpers.views.widgets.hardware import HardwareChoice
from qlora_helpers.views.widgets.panel import Panel, button, copyable, said, styled, wrong
from qlora_helpers.views.widgets.settings_code import differences, settings_code, settings_command

BASIC: dict[str, tuple[str, ...]] = {
    "adapter": ("r", "lora_alpha", "lora_dropout", "target_modules"),
    "data": ("source", "seq_len_tokens", "packing", "template", "train_rows"),
    "train": (
        "learning_rate",
        "epochs",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "activation_checkpointing",
        "optim",
    ),
}
"""What matters first; the rest of a section stands under 'more'."""
TITLES = {"adapter": "Adapter", "data": "Data", "train": "Training", "model": "Model", "evaluation": "Evaluation"}
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
        forecast: what `config` leads to, or None where that can't be told.
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
        self.forecast: Forecast | None = None
        self._trouble = ""  # why there is no outlook of the run's own settings
        self._hidden: dict[str, Any] = {}  # changes of settings that have no control here
        self._busy = False
        self._shapes: dict[tuple[str, str | None], dict[str, Any] | UserError] = {}
        self.choice = HardwareChoice(gpus, self._usual_hardware, self._hardware_changed)
        self.fields = self._make_fields()
        self.box = self._layout()
        self._hardware_changed()

    @property
    def hardware(self) -> Hardware:
        """What is planned for."""
        return self.choice.hardware

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
            self.message.value = wrong(str(error))
            return
        self._show(self.saved)

    def save(self) -> bool:
        """Writes what was changed to the run, beside what others changed meanwhile; says so in the form.

        Returns:
            Whether it was written. Where it was not, the form says why and keeps every value.
        """
        changes = differences(self.config, self.saved)
        if self.wrong.value:
            self.message.value = wrong("Not saved: first put right what is marked above, or press Reset.")
            return False
        try:
            config = self.run.config().with_settings({name: value for name, (value, _) in changes.items()})
            self._write(config)
        except UserError as error:
            self.message.value = wrong(f"Not saved. {error}")
            return False
        self.saved = config
        self._show(config)
        later = ""
        with contextlib.suppress(UserError):
            if self.run.status().state == "running":
                later = " A trainer is running: they count from its next start."
        self.message.value = said(f"Saved to {self.run.name}: {_change_text(changes) or 'nothing was changed'}.{later}")
        return True

    # what it looks like

    def _make_fields(self) -> dict[str, Field]:
        fields = {}
        for section in self.sections:
            for row in describe(getattr(self.config, section)):
                name = f"{section}.{row['name']}"
                options = self._layer_names() if name == "adapter.target_modules" else ()
                fields[name] = Field(name, row, self._changed, options=options)
        return fields

    def _layer_names(self) -> list[str]:
        try:
            return [layer.name for layer in model_sizes(self._shape(self.config)).linears]
        except UserError:
            return []

    def _layout(self) -> ipywidgets.VBox:
        self.wrong, self.message, self.code = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.code.add_class("qlora-code")
        self.save_button = button("Save", f"Writes the settings to the run {self.run.name}", self.save, "primary")
        self.save_button.add_class("qlora-save-config")
        reset = button("Reset", "Shows what the run has now; changes are lost", self.reset)
        reset.add_class("qlora-reset")
        self.view = ForecastView(self.choice.box, self.take)
        controls = ipywidgets.VBox(
            [self._section_tabs(), self.wrong, ipywidgets.HBox([self.save_button, reset]), self.message],
            layout={"flex": "1 1 370px", "min_width": "0"},
        )
        controls.add_class("qlora-controls")
        controls.add_class("qlora-card")
        columns = ipywidgets.HBox([controls, self.view.box])
        columns.add_class("qlora-columns")
        return styled([ipywidgets.HTML(FIELD_STYLE, layout={"display": "none"}), columns, self.code], "qlora-form")

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

    # what happens

    def _changed(self) -> None:
        """A control was moved: takes the values if they are good together, else says what is wrong and keeps the last good ones."""
        if self._busy:
            return
        try:
            config = self.saved.with_settings(self._hidden | {name: field.value for name, field in self.fields.items()})
            found = self._look(config)
        except UserError as error:
            text = "\n".join(error.problems) if isinstance(error, ConfigError) else str(error)
            self.wrong.value = wrong(f"{text}\nShown beside: the last settings without a mistake.")
            return
        self.config, self.forecast, self.wrong.value = config, found, ""
        self._draw()

    def _hardware_changed(self) -> None:
        """Works the consequences of the last good settings out again. The run's own settings are never refused here."""
        try:
            self._trouble = ""
            self.forecast = self._look(self.config)
        except UserError as error:
            self.forecast, self._trouble = None, str(error)
        self._draw()

    def _show(self, config: RunConfig) -> None:
        """Puts whole settings into the controls."""
        changes = differences(config, self.saved)
        self._hidden = {name: value for name, (value, _) in changes.items() if name not in self.fields}
        self._busy = True
        for name, field in self.fields.items():
            section, _, key = name.partition(".")
            field.show(getattr(getattr(config, section), key))
        self._busy = False
        self._changed()

    def _look(self, config: RunConfig) -> Forecast | None:
        """What settings lead to; None where the trouble is the one that the run had already, so that the rest can be edited.

        Raises:
            UserError: a new one, such as a file that is not there.
        """
        try:
            return forecast(config, hardware=self.hardware, shape=self._shape(config))
        except UserError as error:
            if str(error) == self._trouble:
                return None
            raise

    def _shape(self, config: RunConfig) -> dict[str, Any]:
        """The model's `config.json`, asked for once.

        Raises:
            ModelError: it can't be had.
        """
        key = config.model.name, config.model.revision
        if key not in self._shapes:
            try:
                self._shapes[key] = find_shape(config.model)
            except UserError as error:
                self._shapes[key] = error
        found = self._shapes[key]
        if isinstance(found, UserError):
            raise found
        return found

    def _draw(self) -> None:
        choice = self.forecast.plan.choice if self.forecast and self.forecast.plan_is_faster else None
        takes_plan = choice is not None and self.config.with_settings(choice.settings) != self.config
        self.view.show(self.forecast, takes_plan=takes_plan, notes=self.choice.notes(), trouble=self._trouble)
        self.code.value = copyable("in a notebook", settings_code(self.run, self.config, self.saved)) + copyable(
            "in a terminal", settings_command(self.run, self.config, self.saved)
        )
        changes = differences(self.config, self.saved)
        text = f"Not saved yet: {_change_text(changes)}" if changes else ""
        self.message.value = f'<div class="muted" role="status">{html.escape(text)}</div>'

    def _usual_hardware(self) -> Hardware:
        usual = parse_gpus(USUAL)
        try:
            plan = forecast(self.config, hardware=usual, shape=self._shape(self.config)).plan
            return usual if plan.fits else cheapest_instance(plan.workload) or usual
        except UserError:
            return usual

    # where there are no widgets

    def _tables(self) -> list[Table]:
        tables = [settings_table(getattr(self.config, section)) for section in self.sections]
        for table, section in zip(tables, self.sections, strict=True):
            table.caption = f"{TITLES[section]}: settings of {self.run.name}"
        if self.forecast is not None:
            found = consequences_table(self.forecast)
            found.rows += [["note", note] for note in self.choice.notes()]
            found.caption = f"What they lead to on {self.hardware.label}"
            tables.append(found)
        return tables

    def still_text(self) -> str:
        """Settings and consequences as tables, and the command that takes them."""
        shown = [f"{table.caption}\n{table!r}" for table in self._tables()]
        return "\n\n".join([*shown, settings_command(self.run, self.config, self.saved)])

    def still_html(self) -> str:
        """The same in HTML."""
        code = f"<pre>{html.escape(settings_command(self.run, self.config, self.saved))}</pre>"
        return "".join(table._repr_html_() for table in self._tables()) + code


def _change_text(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {_plain(old)} → {_plain(new)}" for name, (new, old) in changes.items())


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(value)
    return "automatic" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
