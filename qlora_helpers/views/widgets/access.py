"""Gives a panel's controls what ipywidgets leave out for screen readers: names, states, values and errors that belong to a control.

Sliders get their field's name and speak its number instead of their stop; buttons that stay pressed say so; a wrong field is marked
as invalid and described by its error. The script is in `access.js`; it changes attributes alone.
"""

from __future__ import annotations

import functools
import html
import importlib.resources

import ipywidgets


def accessible() -> ipywidgets.HTML:
    """Makes the widget that does this for the panel that it is put into; it shows nothing."""
    return ipywidgets.HTML(f'<style onload="{_script()}"></style>', layout={"display": "none"})


@functools.cache
def _script() -> str:
    text = (importlib.resources.files(__package__) / "access.js").read_text(encoding="utf-8")
    return html.escape(" ".join(line.strip() for line in text.splitlines() if not line.strip().startswith("//")))
