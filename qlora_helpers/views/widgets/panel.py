"""What every widget here is: a box of live controls where a browser can show them, and else a still text or table.

Owns the choice between the two and the looks, which take JupyterLab's own colours so that light and dark themes both read well.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets

RED = "var(--jp-error-color1, #cf222e)"
STYLE = """<style>
.qlora-panel { color: var(--jp-ui-font-color1, inherit); font-size: 13px; max-width: 1180px; overflow: visible; }
.qlora-panel .widget-inline-hbox .widget-label { color: var(--jp-ui-font-color1, inherit); }
.qlora-panel .muted, .qlora-panel .qlora-help { color: var(--jp-ui-font-color2, #6e7781); }
.qlora-panel .widget-html-content, .qlora-panel .jupyter-widget-html-content { line-height: 1.45; }
.qlora-columns { flex-wrap: wrap; gap: 12px; overflow: visible; }
.qlora-card { border: 1px solid var(--jp-border-color2, #ccc); border-radius: 6px; padding: 8px 12px;
  background: var(--jp-layout-color1, transparent); overflow: visible; }
.qlora-panel .qlora-wrong { border-left: 4px solid var(--jp-error-color1, #cf222e); padding: 2px 8px; margin: 2px 0;
  color: var(--jp-error-color1, #cf222e); white-space: pre-wrap; }
.qlora-panel .qlora-said { border-left: 4px solid var(--jp-success-color1, #1a7f37); padding: 2px 8px; margin: 2px 0;
  white-space: pre-wrap; }
.qlora-panel .qlora-text { border: 1px solid var(--jp-border-color2, #ccc); border-radius: 4px; padding: 8px 10px;
  background: var(--jp-layout-color0, transparent); white-space: pre-wrap; overflow-wrap: anywhere; overflow-y: auto; }
.qlora-panel textarea.qlora-copy { width: 100%; box-sizing: border-box; resize: vertical; tab-size: 4;
  font: 12px/1.5 var(--jp-code-font-family, monospace); color: var(--jp-ui-font-color1, inherit);
  background: var(--jp-layout-color2, transparent); border: 1px solid var(--jp-border-color2, #ccc); border-radius: 4px; }
.qlora-panel button.qlora-copy { font: inherit; font-size: 12px; cursor: pointer; padding: 1px 10px; margin: 0 0 2px 8px;
  color: var(--jp-ui-font-color1, inherit); background: var(--jp-layout-color3, transparent);
  border: 1px solid var(--jp-border-color2, #ccc); border-radius: 4px; }
.qlora-panel :is(button, input, select, textarea, .noUi-handle):focus-visible {
  outline: 2px solid var(--jp-brand-color1, #2196f3); outline-offset: 1px; }
</style>"""


class Panel:
    """A widget that is shown live in JupyterLab and as text or HTML where there are no widgets.

    Attributes:
        box: the live widget.
    """

    box: ipywidgets.Box

    def still_text(self) -> str:
        """What a terminal shows."""
        raise NotImplementedError

    def still_html(self) -> str:
        """What a page without live widgets shows."""
        return f"<pre>{html.escape(self.still_text())}</pre>"

    def __repr__(self) -> str:
        return self.still_text()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The live view beside its still versions; a front end takes the richest that it can show."""
        view = self.box._repr_mimebundle_() or {}
        return view | {"text/plain": self.still_text(), "text/html": self.still_html()}


def wrong(text: str) -> str:
    """A message about what can't be, as HTML; a screen reader says it at once."""
    return f'<div class="qlora-wrong" role="alert">{html.escape(text)}</div>' if text else ""


def said(text: str) -> str:
    """A message that all is well, as HTML."""
    return f'<div class="qlora-said" role="status">{html.escape(text)}</div>' if text else ""


def copyable(label: str, text: str) -> str:
    """A text to copy, as HTML: it selects itself when it is entered, and a button puts it on the clipboard."""
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
    """A button as wide as its text.

    Args:
        text, tooltip: what it says, and what it does.
        clicked: called when it is pressed.
        style: `primary` for what most people will press.
    """
    made = ipywidgets.Button(description=text, tooltip=tooltip, button_style=style)
    made.layout.width, made.layout.align_self = "auto", "flex-start"
    made.on_click(lambda _: clicked())
    return made


def styled(children: list[Any], *classes: str) -> ipywidgets.VBox:
    """A box with the looks of this package.

    Args:
        children: widgets, from top to bottom.
        classes: CSS classes besides the common one.
    """
    box = ipywidgets.VBox([ipywidgets.HTML(STYLE, layout={"display": "none"}), *children])
    for name in ("qlora-panel", *classes):
        box.add_class(name)
    return box
