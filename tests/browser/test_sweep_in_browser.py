"""A sweep as a person sees it: planned and started in its form, left, found again in the list of runs, and stopped."""

from __future__ import annotations

import re

import pytest
from lab import end
from playwright.sync_api import expect

from qlora_helpers.runs.folder import Run

SETTINGS = [
    "train.max_steps=5000",
    "train.save_steps=2000",
    "data.train_rows=4",
    "data.eval_rows=1",
    "data.test_rows=1",
]
CELLS = [
    f"import qlora_helpers as ql\nrun = ql.open_run('swept', profile='tiny', settings={SETTINGS})",
    "ql.sweep_form(run)",
    "ql.list_runs(where='swept')",
    "import time\nsweep = ql.sweep('swept.sweep').stop()\nsweep = ql.sweep('swept')\n"
    "while sweep.status().is_live:\n    time.sleep(0.2)\nsweep",
]


@pytest.fixture
def notebook(lab, opened):
    """A notebook with the form; what it starts ends with the test."""
    yield opened(lab.add_notebook("sweep.ipynb", CELLS))
    for name in ("swept.sweep", "swept-r4", "swept-r8"):
        end(Run(lab.runs / name))


@pytest.mark.only_slow
def test_a_sweep_is_planned_started_left_found_again_and_stopped(notebook, lab, picture):
    page = notebook.page
    for cell in (0, 1):
        notebook.run_cell(cell)
    form = page.locator(".qlora-sweep")
    values = form.get_by_role("textbox", name="Values").first
    values.fill("4, 8")
    values.press("Tab")
    form.get_by_role("button", name="Plan").focus()
    page.keyboard.press("Enter")
    expect(form).to_contain_text(re.compile(r"All together: about .* on this CPU"))
    expect(form).to_contain_text("There is no GPU to train on")
    assert not (lab.runs / "swept.sweep").exists(), "a plan writes nothing"
    picture(notebook, form, "sweep")
    form.get_by_role("button", name="Start").click()
    expect(form).to_contain_text("runs in the background")

    notebook.reload()
    notebook.run_cell(2)
    row = page.locator(".qlora-run", has=page.get_by_role("checkbox", name="swept.sweep"))
    expect(row).to_contain_text("running")
    expect(row).to_contain_text("sweep of swept, 2 runs: r=4,8")
    while not any("loss" in line for line in Run(lab.runs / "swept-r4").progress()):
        page.wait_for_timeout(500)
    notebook.run_cell(3)
    expect(page.locator(".jp-Cell").last).to_contain_text("swept.sweep: 2 runs of swept, 0 done; stopped")
    assert Run(lab.runs / "swept-r4").status().state == "stopped" and not Run(lab.runs / "swept-r8").has_trained()
