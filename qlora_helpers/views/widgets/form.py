"""A form for a run's settings that shows at once what a change costs and whether the run still fits.

It edits a copy of the run's configuration until that is saved. Texts, choices and limits come from `config`, figures from
`planning.forecast`. It imports no torch and loads no model.
"""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ipywidgets

from qlora_helpers.base.config import SECTIONS, RunConfig
from qlora_helpers.base.errors import ConfigError, UserError
from qlora_helpers.base.tables import Table, settings_table
from qlora_helpers.machine.hardware import Hardware, parse_gpus
from qlora_helpers.model.shapes.lookup import find_shape
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.cost import TrainingCost
from qlora_helpers.planning.fixes import cheapest_instance
from qlora_helpers.planning.forecast import Forecast
from qlora_helpers.planning.run_plan import forecast
from qlora_helpers.runs.folder import Run
from qlora_helpers.views.widgets.beside import Beside
from qlora_helpers.views.widgets.consequences import consequences_table, cpu_table, short
from qlora_helpers.views.widgets.forecast_view import ForecastView
from qlora_helpers.views.widgets.forecasting import look, placed
from qlora_helpers.views.widgets.form_pages import TITLES, SectionPages, make_fields
from qlora_helpers.views.widgets.hardware import HardwareChoice
from qlora_helpers.views.widgets.panel import Panel, add_classes, button, copyable, error_html, styled, success_html
from qlora_helpers.views.widgets.preview import RowPreview
from qlora_helpers.views.widgets.settings_code import change_text, differences, settings_code, settings_command

USUAL = "ml.g5.xlarge"  # the forecast on a machine without a GPU is for this one, if the run can be made to fit on it


class ConfigForm(Panel):
    """Controls for a run's settings, with their consequences beside them.

    Args:
        run: a run with settings (`workflow.open_run` makes one).
        sections: some of `adapter`, `data`, `train`, `model`, `evaluation`.
        gpus: the hardware to plan for, such as `4x24GiB`, `H100` or `ml.g5.12xlarge`; None takes this machine: its GPUs, or
            its CPU, beside which `ml.g5.xlarge` or else the cheapest instance that would do is shown.
        save: writes the settings; None takes `run.change_config`.

    Attributes:
        config: the last valid settings that were shown.
        saved: the settings as the run has them.
        forecast: what `config` leads to on GPUs, or None if there is no forecast.
        cost: what it leads to on this machine's CPU; None where it is planned for GPUs.
        fields: name -> the control of a setting.
        preview: the look at a row of the data; None without the section `data`.

    Raises:
        RunError: the run has no settings yet.
        UserError: the hardware or a section is unknown.
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
            raise UserError(
                "there is no such section", expected=f"some of {', '.join(SECTIONS)}", got=repr(unknown or sections)
            )
        self.run, self.sections, self._write = run, sections, save or run.change_config
        self.config = self.saved = run.config()
        self.forecast: Forecast | None = None
        self.cost: TrainingCost | None = None
        self._usual: Hardware | None = None
        self._trouble = ""  # why there is no forecast for the run's own settings
        self._hidden: dict[str, Any] = {}  # changes of settings without a control here
        self._busy = False
        self._shapes: dict[tuple[str, str | None], dict[str, Any] | UserError] = {}
        self.choice = HardwareChoice(gpus, self._hardware_changed)
        self.fields = make_fields(self.config, self.sections, self._changed, self._layer_names())
        self.preview = RowPreview() if "data" in self.sections else None
        self.box = self._layout()
        self._hardware_changed()

    @property
    def hardware(self) -> Hardware | None:
        """The hardware that the form plans for; None for this machine's CPU."""
        return self.choice.hardware

    # what a person does

    def take(self, settings: Iterable[str]) -> None:
        """Puts settings in the form of `--set` into the controls without saving them.

        Raises:
            ConfigError: a setting is unknown or wrong; nothing is changed.
        """
        self._show(self.config.with_settings(list(settings)))

    def reset(self) -> None:
        """Discards the changes and shows the settings that the run has now."""
        try:
            self.saved = self.run.config()
        except UserError as error:
            self.message.value = error_html(str(error))
            return
        self._show(self.saved)

    def save(self) -> bool:
        """Writes the changes to the run without undoing what others changed meanwhile, and reports the result in the form.

        Returns:
            Whether they were written. If not, the form says why and keeps every value.
        """
        changes = differences(self.config, self.saved)
        if self.problems.value:
            self.message.value = error_html("Not saved. Correct what is marked first, or press Reset.")
            return False
        try:
            config = self.run.config().with_settings({name: value for name, (value, _) in changes.items()})
            self._write(config)
        except UserError as error:
            self.message.value = error_html(f"Not saved. {error}")
            return False
        self.saved = config
        self._show(config)
        later = ""
        with contextlib.suppress(UserError):
            if self.run.status().state == "running":
                later = " A trainer is running; it uses the new settings from its next start."
        self.message.value = success_html(
            f"Saved to {self.run.name}: {change_text(changes) or 'there was nothing to change'}.{later}"
        )
        return True

    # what it looks like

    def _layer_names(self) -> list[str]:
        try:
            return [layer.name for layer in model_sizes(self._shape(self.config)).linears]
        except UserError:
            return []

    def _layout(self) -> ipywidgets.VBox:
        self.problems, self.message, self.code, self.summary = (ipywidgets.HTML() for _ in range(4))
        add_classes(self.code, "qlora-code")
        add_classes(self.summary, "qlora-summary")
        self.save_button = button("Save", f"Writes the settings to the run {self.run.name}", self.save, "primary")
        add_classes(self.save_button, "qlora-save-config")
        reset = button("Reset", "Discards the changes and shows the settings that the run has now", self.reset)
        add_classes(reset, "qlora-reset")
        self.view = ForecastView(self.choice.box, self.take, self.choice.choose)
        self.pages = SectionPages(self.fields, self.sections)
        self.pages.when_turned(self._page_turned)
        line = ipywidgets.HBox(
            [self.save_button, reset, self.summary], layout={"align_items": "center", "overflow": "visible"}
        )
        # What must be in sight wherever a person scrolls is outside the pages, which scroll for themselves
        bar = add_classes(ipywidgets.VBox([line, self.problems, self.message]), "qlora-save-bar")
        controls = ipywidgets.VBox([self.pages.box, bar], layout={"flex": "1 1 370px", "min_width": "0"})
        add_classes(controls, "qlora-controls", "qlora-card")
        self.beside = Beside(self.view, self.preview)
        columns = add_classes(ipywidgets.HBox([controls, self.beside.box]), "qlora-columns")
        if self.pages.section == "data":
            self._page_turned()
        return styled([columns, self.code], "qlora-form")

    def _page_turned(self) -> None:
        self.beside.turn_to(row=self.pages.section == "data")

    # what happens

    def _changed(self) -> None:
        """Takes the values of the controls if they are valid together, else says what is wrong and keeps the last valid ones."""
        if self._busy:
            return
        try:
            config = self.saved.with_settings(self._hidden | self._values())
            found = self._look(config)
        except UserError as error:
            self._complain(error)
            return
        self._complain(None)
        self.config, (self.forecast, self.cost) = config, found
        self._draw()

    def _values(self) -> dict[str, Any]:
        """Returns the values of the controls.

        Raises:
            ConfigError: some are not what their settings need; names all of them.
        """
        values, problems = {}, list[str]()
        for name, field in self.fields.items():
            try:
                values[name] = field.value
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        return values

    def _complain(self, error: UserError | None) -> None:
        """Says what is wrong beside each field, and in one place that is always in sight; None says that all is well."""
        wrong = placed(error, self.fields) if error is not None else {}
        for name, field in self.fields.items():
            field.complain(wrong.get(name, ""))
            if name in wrong:
                self.pages.reveal(name)
        lines = [f"{name}: {text}" if name else text for name, text in wrong.items()]
        self.problems.value = error_html(
            "\n".join([*lines, "The figures are for the last valid settings."] if lines else [])
        )

    def _hardware_changed(self) -> None:
        """Computes the forecast for the last valid settings again; the run's own settings are never refused here."""
        try:
            self._trouble = ""
            self.forecast, self.cost = self._look(self.config)
        except UserError as error:
            self.forecast, self.cost, self._trouble = None, None, str(error)
            for name, text in placed(error, self.fields).items():
                if name:
                    self.fields[name].complain(text)
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

    def _look(self, config: RunConfig) -> tuple[Forecast | None, TrainingCost | None]:
        """Returns the forecast and the CPU's time, or nothing for a problem that the run had already: the rest can be edited.

        Raises:
            UserError: a new problem, such as a missing file.
        """
        try:
            shape = self._shape(config)
            usual = self.hardware or self._usual_hardware()
            found = look(config, self.hardware, usual, shape, self.choice.usd_per_hour)
            return found.forecast, found.cost
        except UserError as error:
            if str(error) == self._trouble:
                return None, None
            raise

    def _shape(self, config: RunConfig) -> dict[str, Any]:
        """Returns the model's `config.json`, which is looked up once.

        Raises:
            ModelError: it is not available.
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
        self.still_changed()
        self.view.show(self.forecast, cost=self.cost, trouble=self._trouble)
        summary = short(self.forecast, self.cost) if self.forecast else "no forecast"
        fits = self.forecast is None or self.cost is not None or self.forecast.fits
        self.summary.value = f'<span class="{"" if fits else "qlora-over"}" role="status">{html.escape(summary)}</span>'
        self.code.value = copyable("in a notebook", settings_code(self.run, self.config, self.saved)) + copyable(
            "in a terminal", settings_command(self.run, self.config, self.saved)
        )
        changes = differences(self.config, self.saved)
        text = f"Not saved yet: {change_text(changes)}" if changes else ""
        self.message.value = f'<div class="muted" role="status">{html.escape(text)}</div>'
        if self.preview is not None:
            self.preview.show(self.config)

    def _usual_hardware(self) -> Hardware:
        """Returns the GPUs that are shown beside a CPU: an instance that many have, if the run can be made to fit on it."""
        if self._usual is None:
            self._usual = parse_gpus(USUAL)
            plan = forecast(self.config, hardware=self._usual, shape=self._shape(self.config)).plan
            self._usual = self._usual if plan.fits else cheapest_instance(plan.workload) or self._usual
        return self._usual

    # where there are no widgets

    def _tables(self) -> list[Table]:
        tables = [settings_table(getattr(self.config, section)) for section in self.sections]
        for table, section in zip(tables, self.sections, strict=True):
            table.caption = f"{TITLES[section]}: settings of {self.run.name}"
        if self.forecast is not None:
            on_cpu = self.cost is not None
            found = cpu_table(self.forecast, self.cost) if self.cost else consequences_table(self.forecast)
            found.caption = f"What they lead to on {self.cost.machine if on_cpu else self.forecast.hardware.label}"  # type: ignore[union-attr]
            tables.append(found)
        return tables

    def still_text(self) -> str:
        """Returns settings and consequences as tables, and the command that uses the settings."""
        return "\n\n".join([*map(repr, self._tables()), settings_command(self.run, self.config, self.saved)])

    def still_html(self) -> str:
        """Returns the same in HTML."""
        code = f"<pre>{html.escape(settings_command(self.run, self.config, self.saved))}</pre>"
        return "".join(table._repr_html_() for table in self._tables()) + code
