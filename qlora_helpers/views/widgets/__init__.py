"""Forms and panels for a notebook: edit a run's settings, look at its data and answers, and watch it train.

They read and write run folders and know no model: a panel that needs answers takes a function. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ConfigForm": "form",
    "row_browser": "rows",
    "answer_panel": "answers",
    "EvaluationPanel": "evaluation_panel",
    "watch": "watch_panel",
    "shown_in_cell": "watch_panel",
    "list_runs": "run_list",
    "sweep_form": "sweep_panel",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a widget's module when the widget is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
