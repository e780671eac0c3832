"""What all panels share: live controls in a browser that can show them, and otherwise a still text or table.

The looks are in `style.css`, which takes JupyterLab's own colours so that light and dark themes both read well.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any, TypeVar

import ipywidgets

from qlora_helpers.base.style import stylesheet

AnyWidget = TypeVar("AnyWidget", bound=ipywidgets.Widget)


class Panel:
    """A widget that is shown live in JupyterLab, and as text or HTML where there are no widgets.

    Attributes:
        box: the live widget.
    """

    box: ipywidgets.Box

    def still_text(self) -> str:
        """Returns what a terminal shows."""
        raise NotImplementedError

    def still_html(self) -> str:
        """Returns what a page without live widgets shows."""
        return f"<pre>{html.escape(self.still_text())}</pre>"

    def __repr__(self) -> str:
        return self.still_text()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Returns the live view with its still versions; a front end takes the richest one that it can show."""
        view = self.box._repr_mimebundle_() or {}
        return view | {"text/plain": self.still_text(), "text/html": self.still_html()}


def error_html(text: str) -> str:
    """Returns an error message as HTML that a screen reader announces at once; an empty text stays empty."""
    return f'<div class="qlora-error" role="alert">{html.escape(text)}</div>' if text else ""


def success_html(text: str) -> str:
    """Returns a message that all is well as HTML; an empty text stays empty."""
    return f'<div class="qlora-success" role="status">{html.escape(text)}</div>' if text else ""


def copyable(label: str, text: str) -> str:
    """Returns a text to copy as HTML: it is selected on focus, and a button puts it on the clipboard."""
    rows = text.count("\n") + 1
    copy = "const t=this.parentNode.querySelector('textarea');t.focus();t.select();"
    copy += "(navigator.clipboard?navigator.clipboard.writeText(t.value):Promise.reject())"
    copy += ".catch(()=>document.execCommand('copy')).then(()=>{this.textContent='Copied'})"
    return (
        f'<div><span class="muted">{html.escape(label)}</span>'
        f'<button type="button" class="qlora-copy" onclick="{html.escape(copy)}">Copy</button>'
        f'<textarea class="qlora-copy" readonly rows="{rows}" spellcheck="false" aria-label="{html.escape(label)}" '
        f'onfocus="this.select()">{html.escape(text)}</textarea></div>'
    )


def button(text: str, tooltip: str, clicked: Callable[[], Any], style: str = "") -> ipywidgets.Button:
    """Makes a button as wide as its text.

    Args:
        text, tooltip: the label, and what the button does.
        clicked: called when it is pressed.
        style: `primary` for the button that most people will press.
    """
    made = ipywidgets.Button(description=text, tooltip=tooltip, button_style=style)
    made.layout.width, made.layout.align_self = "auto", "flex-start"
    made.on_click(lambda _: clicked())
    return made


def styled(children: list[Any], *classes: str) -> ipywidgets.VBox:
    """Makes a box that carries the stylesheet.

    Args:
        children: widgets from top to bottom.
        classes: CSS classes besides the common one.
    """
    sheet = ipywidgets.HTML(f"<style>{stylesheet('colours', 'panel')}</style>", layout={"display": "none"})
    return add_classes(ipywidgets.VBox([sheet, *children]), "qlora-panel", *classes)


def add_classes(widget: AnyWidget, *names: str) -> AnyWidget:
    """Adds CSS classes to a widget and returns it."""
    for name in names:
        widget.add_class(name)
    return widget
