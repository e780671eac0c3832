"""A run of its own, watched: started in the background, seen to learn, left, found again, killed, resumed, stopped, and on disk."""

from __future__ import annotations

import pytest
from lab import LAPTOP, end
from playwright.sync_api import expect

from qlora_helpers.runs.folder import Run
from qlora_helpers.training.checkpoints import newest_good

SETTINGS = ["train.max_steps=5000", "train.logging_steps=1", "train.eval_steps=25", "train.save_steps=2000"]


@pytest.fixture
def run(lab):
    """A run that would take many minutes; its trainer ends with the test, whatever happens."""
    run = Run(lab.runs / "watched-live")
    yield run
    end(run)


@pytest.fixture
def notebook(lab, opened, run):
    """A notebook that starts and watches it."""
    cells = [
        "from qlora_helpers import workflow\nfrom qlora_helpers.runs.launch import start\n"
        "from qlora_helpers.views.widgets import watch",
        f"run = workflow.open_run('{run.name}', profile='tiny', settings={SETTINGS})\nstart(run)",
        "watch(run, start)",
    ]
    return opened(lab.add_notebook("watch.ipynb", cells))


def drawn_points(panel) -> int:
    """Points of the training loss as they are drawn."""
    return panel.locator(".main path.line").first.evaluate(
        "line => (line.getAttribute('d') || '').split('L').length - 1"
    )


def until_more_points(page, panel, than: int) -> None:
    """Waits until the line of the training loss has more points than that."""
    page.wait_for_function(
        "than => (document.querySelector('.qlora-watch .main path.line')?.getAttribute('d') || '').split('L').length - 1 > than",
        arg=than,
    )


def test_start_watch_reload_kill_resume_stop_and_find_the_checkpoint(notebook, run, picture):
    page = notebook.page
    notebook.run_all()
    panel = page.locator(".qlora-watch")
    expect(panel.locator(".qlora-state")).to_contain_text("running")
    until_more_points(page, panel, 3)
    until_more_points(page, panel, drawn_points(panel) + 10)

    notebook.reload()
    expect(panel.locator(".qlora-state")).to_contain_text("running")
    until_more_points(page, panel, drawn_points(panel) + 10)
    panel.locator("button.qlora-save").click()
    expect(panel).to_contain_text("saved at step")
    expect(panel.locator(".mark.saved")).to_have_count(1)

    step = run.status().step
    end(run)  # as a machine that is out of memory does
    expect(panel.locator(".qlora-state")).to_contain_text("dead")
    expect(panel.get_by_role("button", name="Stop and save")).to_be_disabled()
    picture(notebook, panel, "watch-killed")
    panel.get_by_role("button", name="Resume").click()
    expect(panel.locator(".qlora-phase")).to_have_text("training")
    expect(panel.locator(".mark.resumed").first).to_be_attached()
    assert panel.get_by_role("button", name="Stop and save").bounding_box()["y"] < LAPTOP["height"]
    page.wait_for_function(
        "step => +document.querySelector('.qlora-progress').getAttribute('aria-valuenow') > step", arg=step
    )

    panel.locator("button.qlora-stop").click()
    expect(panel.locator(".qlora-state")).to_contain_text("stopped")
    status = run.status()
    assert status.state == "stopped" and 0 < status.step < status.max_steps
    assert newest_good(run.checkpoints_dir).name == f"checkpoint-{status.step}"
