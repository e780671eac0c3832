"""Forms that edit a run's settings, panels to look at its data and answers, and one that watches it, inside a notebook.

They read and write run folders and know no model: a panel that needs answers is handed a function. No torch is imported here.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ConfigForm": "form",
    "row_browser": "rows",
    "answer_panel": "answers",
    "watch": "watch_panel",
    "shown_in_cell": "watch_panel",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a widget's module when the widget is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
