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
"""The settings of a section that come first; the others are under 'more'."""
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


def section_pages(fields: Mapping[str, Field], sections: Sequence[str]) -> ipywidgets.Widget:
    """Returns the fields on a page for each section, with tabs if there are several."""
    pages = []
    for section in sections:
        names = [name for name in fields if name.startswith(f"{section}.")]
        first = [f"{section}.{key}" for key in BASIC.get(section, ())] or names
        rest = [name for name in names if name not in first]
        page = [fields[name].box for name in first]
        if rest:
            more = ipywidgets.Accordion([ipywidgets.VBox([fields[name].box for name in rest])])
            more.titles, more.selected_index = ("more",), None
            page.append(add_classes(more, "qlora-more"))
        pages.append(ipywidgets.VBox(page, layout={"overflow": "visible"}))
    if len(pages) == 1:
        return pages[0]
    return ipywidgets.Tab(pages, titles=[TITLES[section] for section in sections], selected_index=0)
