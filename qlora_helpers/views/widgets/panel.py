"""What all panels share: live controls in a browser that can show them, and otherwise a still text or table.

The looks are in `style.css`, which takes JupyterLab's own colours so that light and dark themes both read well.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import sys
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import ipywidgets

from qlora_helpers.base.style import stylesheet
from qlora_helpers.views.widgets.access import accessible

AnyWidget = TypeVar("AnyWidget", bound=ipywidgets.Widget)


class Panel:
    """A widget that is shown live in JupyterLab, and as text or HTML where there are no widgets.

    In a notebook a panel is two outputs: the live widget, and below it a still copy, which is hidden while a live panel is above
    it. A saved notebook so shows the last state wherever it is opened, also where the widget's kernel is gone: in JupyterLab,
    VS Code, nbconvert and on GitHub. A panel calls `still_changed` when its still copy may have become outdated.

    Attributes:
        box: the live widget.
        still_after_s: seconds between a change and the update of the still copy; changes in between are joined.
    """

    box: ipywidgets.Box
    still_after_s = 2.0
    _copy_id = ""
    _loop: asyncio.AbstractEventLoop | None = None
    _copied: str | None = None  # the still copy as the notebook has it
    _copy_waits = False

    def still_text(self) -> str:
        """Returns what a terminal shows."""
        raise NotImplementedError

    def still_html(self) -> str:
        """Returns what a page without live widgets shows."""
        return f"<pre>{html.escape(self.still_text())}</pre>"

    def __repr__(self) -> str:
        return self.still_text()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Returns the live view with its still versions in one output; a front end takes the richest one that it can show."""
        view = self.box._repr_mimebundle_() or {}
        return view | {"text/plain": self.still_text(), "text/html": self.still_html()}

    def _ipython_display_(self) -> None:
        """Shows the live widget and its still copy as two outputs of the cell; in a terminal, the text."""
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        if getattr(shell, "kernel", None) is None:
            print(self.still_text())
            return
        from IPython.display import display

        view = self.box._repr_mimebundle_() or {}
        display(view | {"text/plain": ""}, raw=True)
        self._copy_id = self._copy_id or uuid.uuid4().hex
        with contextlib.suppress(RuntimeError):  # a kernel without a loop: the still copy stays as it is
            self._loop = asyncio.get_running_loop()
        self._copied = self.still_html()
        display(self._copy_bundle(), raw=True, display_id=self._copy_id)

    def still_changed(self) -> None:
        """Updates the still copy in a while, if the panel is shown in a notebook; may be called from any thread."""
        if self._loop is None or self._copy_waits or self._loop.is_closed():
            return
        self._copy_waits = True
        loop = self._loop
        loop.call_soon_threadsafe(lambda: loop.call_later(self.still_after_s, self.refresh_still))

    def refresh_still(self, *, always: bool = False) -> None:
        """Updates the still copy now, if the panel is shown in a notebook and the copy is outdated.

        Args:
            always: also where it is up to date; nbclient takes updates from the cell that is running alone, and missed the others.
        """
        self._copy_waits = False
        if self._copied is None or ((found := self.still_html()) == self._copied and not always):
            return
        from IPython.display import update_display

        self._copied = found
        update_display(self._copy_bundle(), raw=True, display_id=self._copy_id)

    def _copy_bundle(self) -> dict[str, Any]:
        return {
            "text/html": f'<div class="qlora-still"><style>{_STILL}</style>{self._copied}</div>',
            "text/plain": repr(self),
        }


_OUTPUT = ".jp-OutputArea-child"
_NO_KERNEL = '.jp-NotebookPanel:has(.jp-Notebook-ExecutionIndicator:is([data-status="unknown"], [data-status="dead"]))'
_STILL = (
    # the still copy goes where a live panel is above it
    f"{_OUTPUT}:has(.qlora-panel:not(.jupyter-widgets-disconnected)):not({_NO_KERNEL} *)"
    f" + {_OUTPUT}:has(.qlora-still) {{display: none}}\n"
    # and JupyterLab's note that it has no such widget, where only the still copy is left
    f"{_OUTPUT}:not(:has(.qlora-panel)):has(+ {_OUTPUT} .qlora-still) {{display: none}}"
)
GONE = "This panel's kernel is gone: run its cell again."


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


def styled(children: list[Any], *classes: str, gone: str = GONE) -> ipywidgets.VBox:
    """Makes a panel's box: it carries the stylesheet, and one line that takes the place of everything once its kernel is gone.

    It also gives its controls the names that screen readers need. The stylesheet alone shows the line: JupyterLab marks widgets
    without a kernel with a class, and nobody is left to ask.

    Args:
        children: widgets from top to bottom.
        classes: CSS classes besides the common one.
        gone: the line.
    """
    sheet = ipywidgets.HTML(f"<style>{stylesheet('colours', 'panel')}</style>", layout={"display": "none"})
    line = add_classes(ipywidgets.HTML(f'<span role="status">{html.escape(gone)}</span>'), "qlora-gone")
    return add_classes(ipywidgets.VBox([sheet, line, *children, accessible()]), "qlora-panel", *classes)


def add_classes(widget: AnyWidget, *names: str) -> AnyWidget:
    """Adds CSS classes to a widget and returns it."""
    for name in names:
        widget.add_class(name)
    return widget


def close_all(widget: ipywidgets.Widget) -> None:
    """Closes a widget and everything in it; closing only a box leaves the rest in kernel and browser."""
    if widget.comm is None:
        return
    held = [getattr(widget, name) for name in widget.keys]
    widget.close()
    for value in held:
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        for each in values:
            if isinstance(each, ipywidgets.Widget):
                close_all(each)
