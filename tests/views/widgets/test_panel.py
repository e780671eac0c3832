"""What all panels share: a live widget with a still copy below it, which follows the panel, in a real kernel."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from qlora_helpers.views.widgets.panel import GONE, Panel, styled

PANEL = """
import asyncio, threading, ipywidgets
from qlora_helpers.views.widgets.panel import Panel, styled
class Shown(Panel):
    still_after_s = 0.05
    def __init__(self):
        self.text, self.box = "before", styled([ipywidgets.HTML("live")])
    def still_text(self):
        return self.text
panel = Shown()
panel
"""
WIDGET = "application/vnd.jupyter.widget-view+json"


def outputs_of(*cells: str) -> list[list[dict]]:
    """The stored outputs of each cell."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return [[output.data for output in cell.outputs if "data" in output] for cell in notebook.cells]


def test_a_panel_is_a_live_widget_and_a_still_copy_that_follows_it():
    changed = "panel.text = '<after>'\npanel.still_changed()\npanel.still_changed()\nawait asyncio.sleep(0.3)"
    thread = (
        "panel.text = 'from a thread'\nthreading.Thread(target=panel.still_changed).start()\nawait asyncio.sleep(0.3)"
    )
    (live, still), again, *_ = outputs_of(PANEL, "panel", changed, thread)
    assert set(live) == {WIDGET, "text/plain"} and live["text/plain"] == ""
    assert WIDGET not in still and still["text/plain"] == "from a thread"
    assert "<pre>from a thread</pre>" in still["text/html"] and 'class="qlora-still"' in still["text/html"]
    assert again[1]["text/html"] == still["text/html"], "a panel that is shown twice has one copy in both places"


def test_what_a_copy_holds_is_text():
    class Evil(Panel):
        box = styled([])

        def still_text(self) -> str:
            return "<script>alert(1)</script>"

    assert "<script" not in Evil().still_html()


def test_without_a_kernel_a_panel_prints_its_text(capsys):
    class Plain(Panel):
        box = styled([])

        def still_text(self) -> str:
            return "in a terminal"

    Plain()._ipython_display_()
    assert capsys.readouterr().out == "in a terminal\n"


@pytest.mark.parametrize(("given", "expected"), [({}, GONE), ({"gone": "It <i>is</i>."}, "It &lt;i&gt;is&lt;/i&gt;.")])
def test_each_panel_carries_the_line_for_a_kernel_that_is_gone(given, expected):
    _, line, _ = styled([], **given).children
    assert expected.replace("'", "&#x27;") in line.value


def test_the_copy_of_a_watched_run_follows_it_to_its_end(tmp_path):
    made = f"""
import sys, asyncio, pathlib
sys.path.insert(0, {str(Path(__file__).parent.parent.parent)!r})
from fake_run import fake_run, add_progress
from qlora_helpers.views.widgets import watch, watch_panel
watch_panel.LIVE_S = 1000
run = fake_run(pathlib.Path({str(tmp_path)!r}))
run.start_session(max_steps=60, resumed_from=0)
add_progress(run)
panel = watch(run)
panel
"""
    ended = "run.set_status(state='finished', step=60, exit_reason='all steps are done')\npanel.refresh()"
    before = outputs_of(made)[0]
    shutil.rmtree(tmp_path / "demo")
    (_, still), _ = outputs_of(made, ended)
    assert before[1]["text/plain"].startswith("demo: running (training), step 0 of 60")
    assert "As of" in before[1]["text/html"] and "sign of life" not in before[1]["text/html"]
    assert still["text/plain"].startswith("demo: finished, step 60 of 60")
    assert "<img alt=" in still["text/html"] and "As of" not in still["text/html"]
