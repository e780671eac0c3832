"""The controls of a form: a field for each setting, on a page for each section.

This module decides which settings come first. What a control looks like is in `fields`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ipywidgets

from qlora_helpers.base.config import RunConfig, describe
from qlora_helpers.views.widgets.fields import Field
from qlora_helpers.views.widgets.panel import add_classes

BASIC: dict[str, tuple[str, ...]] = {
    "adapter": ("r", "lora_alpha", "lora_dropout", "target_modules"),
    "data": (
        *("source", "format", "prompt", "answer", "system", "instruction", "column"),
        *("template", "train_on", "seq_len_tokens", "long_rows", "packing", "train_rows"),
    ),
    "train": (
        "learning_rate",
        "epochs",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "activation_checkpointing",
        "optim",
    ),
}
"""The settings of a section that come first; the others are shown by a button."""
TITLES = {"adapter": "Adapter", "data": "Data", "train": "Training", "model": "Model", "evaluation": "Evaluation"}


def make_fields(
    config: RunConfig, sections: Sequence[str], changed: Callable[[], None], layer_names: Sequence[str]
) -> dict[str, Field]:
    """Makes a field for each setting.

    Args:
        config: the values to begin with.
        sections: the sections to edit.
        changed: called after each change that a person makes.
        layer_names: the layers that can have an adapter.
    """
    fields = {}
    for section in sections:
        for row in describe(getattr(config, section)):
            name = f"{section}.{row['name']}"
            options = layer_names if name == "adapter.target_modules" else ()
            fields[name] = Field(name, row, changed, options=options)
    return fields


class MoreSettings:
    """The settings of a page that come last, behind a button that the keyboard reaches like any other.

    Args:
        fields: those settings.

    Attributes:
        box: the widget to show.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self._count = len(fields)
        self._rest = ipywidgets.VBox([field.box for field in fields], layout={"overflow": "visible"})
        self._button = add_classes(ipywidgets.Button(layout={"width": "auto"}), "qlora-more-button")
        self._button.on_click(lambda _: self.show(not self.shown))
        self.box = add_classes(ipywidgets.VBox([self._button, self._rest]), "qlora-more")
        self.box.layout.overflow = "visible"
        self.show(False)

    @property
    def shown(self) -> bool:
        """Whether these settings are seen."""
        return self._rest.layout.display != "none"

    def show(self, shown: bool) -> None:
        """Shows or hides these settings."""
        self._rest.layout.display = "" if shown else "none"
        self._button.description = f"Hide {self._count} settings" if shown else f"Show {self._count} more settings"
        (self._button.add_class if shown else self._button.remove_class)("qlora-open")


class SectionPages:
    """The fields on a page for each section, with tabs if there are several.

    Args:
        fields: name -> field.
        sections: the sections, in the order of the pages.

    Attributes:
        box: the widget to show.
        more: section -> its settings that come last.
    """

    def __init__(self, fields: Mapping[str, Field], sections: Sequence[str]) -> None:
        self.sections, self.more = tuple(sections), dict[str, MoreSettings]()
        pages = []
        for section in sections:
            names = [name for name in fields if name.startswith(f"{section}.")]
            first = [f"{section}.{key}" for key in BASIC.get(section, ())] or names
            page = [fields[name].box for name in first]
            if rest := [fields[name] for name in names if name not in first]:
                self.more[section] = MoreSettings(rest)
                page.append(self.more[section].box)
            pages.append(ipywidgets.VBox(page, layout={"overflow": "visible"}))
        titles = [TITLES[section] for section in sections]
        several = len(pages) > 1
        self.box = ipywidgets.Tab(pages, titles=titles, selected_index=0) if several else ipywidgets.VBox(pages)
        add_classes(self.box, "qlora-pages" if several else "qlora-page")

    @property
    def section(self) -> str:
        """The section whose page is seen."""
        return self.sections[self.box.selected_index or 0] if len(self.sections) > 1 else self.sections[0]

    def when_turned(self, turned: Callable[[], None]) -> None:
        """Calls a function each time that another page is chosen."""
        if len(self.sections) > 1:
            self.box.observe(lambda _: turned(), names="selected_index")

    def reveal(self, name: str) -> None:
        """Shows the settings that come last on the page of a setting, if it is among them."""
        section, _, key = name.partition(".")
        if section in self.more and key not in BASIC.get(section, ()):
            self.more[section].show(True)
