"""Panels and the kernels under them: restarted, gone, and a saved notebook that is opened again."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from lab import MADE
from playwright.sync_api import expect

GONE = "This panel's kernel is gone: run its cell again"


@pytest.fixture
def watched(lab, opened):
    """A notebook with the panel of a run that seems to train: its trainer is the notebook's own kernel."""
    cells = [MADE, "import qlora_helpers as ql\nql.watch(run, ql.start)"]
    notebook = opened(lab.add_notebook("outlive.ipynb", cells))
    notebook.run_all()
    expect(notebook.page.locator(".qlora-watch .qlora-state")).to_contain_text("running")
    return notebook


def restart(notebook) -> None:
    notebook.page.evaluate("() => notebook.sessionContext.session.kernel.restart()")
    notebook.wait_idle()


def test_a_panel_whose_kernel_restarts_becomes_one_line_and_a_still_picture(watched, picture):
    page, panel = watched.page, watched.page.locator(".qlora-watch")
    still = page.locator(".qlora-still")
    expect(still).to_be_hidden()  # a live panel is above it
    picture(watched, panel, "watch-live")
    restart(watched)
    expect(panel.locator(".qlora-gone")).to_have_text(f"{GONE}; the run goes on.")
    expect(panel.get_by_role("button")).to_have_count(0)
    expect(still).to_be_visible()
    expect(still.locator("img")).to_be_visible()
    picture(watched, page.locator(".jp-Notebook"), "watch-gone")
    watched.run_all()
    expect(page.locator(".qlora-watch .qlora-state")).to_contain_text("running")
    expect(page.locator(".qlora-still")).to_be_hidden()
    page.evaluate("() => notebook.sessionContext.shutdown()")
    expect(panel.locator(".qlora-gone")).to_be_visible()
    expect(panel.get_by_role("button")).to_have_count(0)
    expect(page.locator(".qlora-still")).to_be_visible()


def test_a_saved_notebook_that_is_opened_again_shows_the_last_state(watched, lab, picture, tmp_path):
    page = watched.page
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("() => !notebook.context.model.dirty")
    watched.close()
    watched.open()
    still = page.locator(".qlora-still")
    expect(still).to_contain_text("demo: running")
    expect(still.locator("img")).to_be_visible()
    page.wait_for_timeout(4000)  # JupyterLab looks for the widget for two seconds
    expect(page.get_by_text("Error displaying widget")).to_be_hidden()
    expect(page.get_by_text("Loading widget")).to_be_hidden()
    picture(watched, page.locator(".jp-Notebook"), "watch-reopened")
    stored = json.loads((lab.folder / watched.name).read_text())
    assert [sorted(output["data"])[-1] for output in stored["cells"][1]["outputs"]] == ["text/plain", "text/plain"]
    command = [
        sys.executable,
        "-m",
        "nbconvert",
        "--to",
        "html",
        "--output-dir",
        str(tmp_path),
        str(lab.folder / watched.name),
    ]
    subprocess.run(command, check=True, capture_output=True)
    exported = page.context.new_page()
    exported.goto((tmp_path / "outlive.html").as_uri())
    expect(exported.locator(".qlora-still img")).to_be_visible()
    expect(exported.locator(".qlora-still")).to_contain_text("step 44 of 60")


def test_values_under_the_pointer_and_a_zoom_that_stays(watched, picture):
    page, panel = watched.page, watched.page.locator(".qlora-watch")
    area, value = panel.locator(".main .qlora-area"), panel.locator(".main figcaption b").first
    expect(value).to_have_text("2.200")
    panel.scroll_into_view_if_needed()
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 6, box["y"] + 40)  # a sixth of 60 steps
    expect(value).to_have_text("2.344")
    expect(panel.locator(".main u")).to_have_attribute("data-step", "step 10")
    picture(watched, panel, "watch-pointer")
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 2 / 3, box["y"] + 60, steps=4)
    page.mouse.up()
    expect(panel.locator(".qlora-from input")).to_have_value("20")
    expect(panel.locator(".qlora-to input")).to_have_value("40")
    charts = panel.locator(".qlora-charts")
    expect(charts).to_have_attribute("data-lo", "20")
    watched.kernel("run.append_progress({'session': 2, 'step': 46, 'loss': 1.9})")
    expect(panel.locator(".qlora-steps-table tbody th").first).to_have_text("40")  # the table shows the same steps
    panel.get_by_role("button", name="All steps").click()
    expect(panel.locator(".qlora-steps-table tbody th").first).to_have_text("46")
    expect(charts).to_have_attribute("data-lo", "0")
    panel.get_by_label("smoothing").select_option("strong")
    expect(panel.locator(".main .raw[d^=M]")).to_have_count(1)
    panel.get_by_label("log scale of the loss").check()
    expect(panel.locator(".main figcaption")).to_contain_text("log scale")
    picture(watched, panel, "watch-smoothed")
    with page.expect_download() as download:
        panel.get_by_role("link", name="Download CSV").click()
    watched.kernel("run.set_status(state='finished', exit_reason='all steps are done')")
    page.wait_for_function("() => JSON.stringify(notebook.content.model.toJSON().cells).includes('demo: finished')")
    lines = download.value.path().read_text().splitlines()
    assert lines[0].startswith("step,session,time,loss,eval_loss") and lines[-1].startswith("46,")


def test_a_cell_that_trains_and_is_interrupted_saves_and_is_no_failure(lab, opened, picture):
    settings = ["train.max_steps=5000", "train.logging_steps=1", "train.save_steps=2000", "train.eval_steps=2000"]
    cells = [f"import qlora_helpers as ql\nrun = ql.open_run('interrupted', profile='tiny', settings={settings})"]
    cells += ["ql.train(run)", "run.status().state, run.status().exit_reason"]
    notebook = opened(lab.add_notebook("interrupted.ipynb", cells))
    page, panel = notebook.page, notebook.page.locator(".qlora-watch")
    notebook.run_cell(0)
    page.evaluate("() => { notebook.content.activeCellIndex = 1; jupyterapp.commands.execute('notebook:run-cell'); }")
    expect(panel.locator(".qlora-state")).to_contain_text(re.compile(r"step [1-9]"))  # however fast it goes
    page.evaluate("() => notebook.sessionContext.session.kernel.interrupt()")
    expect(panel.locator(".qlora-state")).to_contain_text("stopped")
    notebook.run_cell(2)
    outputs = notebook.outputs()
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert outputs[-1]["data"]["text/plain"] == "('stopped', 'stopped and saved when it was interrupted')"
    picture(notebook, page.locator(".jp-Notebook"), "watch-interrupted")


def test_a_run_whose_folder_is_gone_says_so(watched, picture):
    panel = watched.page.locator(".qlora-watch")
    watched.kernel("import shutil; shutil.rmtree(run.folder)")
    expect(panel.get_by_role("alert")).to_contain_text("The folder of the run 'demo' is gone")
    for name in ("Stop and save", "Save now", "Start"):
        expect(panel.get_by_role("button", name=name)).to_be_disabled()
    picture(watched, panel, "watch-no-folder")
