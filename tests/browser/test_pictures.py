"""Pictures for the README that take longer than a test should: taken where QLORA_SCREENSHOTS is set.

The answers are those of the run that `make demo` leaves.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from lab import ROOT, end
from playwright.sync_api import expect

from qlora_helpers.runs.folder import Run

# Read before the tests' own settings take their place.
DEMO_RUNS = Path(os.environ.get("QLORA_RUNS") or ROOT / "runs").resolve()
CACHE = os.environ.get("QLORA_CACHE")
WATCHED = [
    "train.max_steps=150",
    "train.save_steps=40",
    "train.logging_steps=1",
    "train.eval_steps=20",
    "train.patience=5",
    "train.stop_at_minutes=30",
]

pytestmark = pytest.mark.skipif(
    "QLORA_SCREENSHOTS" not in os.environ, reason="no pictures are asked for (QLORA_SCREENSHOTS)"
)


def test_answers_and_rows_of_the_demo(lab, opened, picture):
    assert (DEMO_RUNS / "demo" / "adapter").is_dir(), "`make demo` makes the run; or name its folder in QLORA_RUNS"
    cells = [
        f"import os\n{'del ' if CACHE is None else ''}os.environ['QLORA_CACHE']{'' if CACHE is None else f' = {CACHE!r}'}\n"
        "from qlora_helpers import workflow\nfrom qlora_helpers.views.widgets import answer_panel, row_browser",
        f"run = workflow.existing_run({str(DEMO_RUNS / 'demo')!r})\nloaded = workflow.load(run)\n"
        "model = workflow.load_adapter(run, loaded)\n"
        "data = workflow.prepare_data(run, loaded.tokenizer, shape=loaded.shape)",
        "answer_panel(workflow.streaming_answers(run, model, loaded), data.test, max_new_tokens=60, vote=str)",
        "row_browser(data, loaded.tokenizer)",
    ]
    notebook = opened(lab.add_notebook("answers.ipynb", cells))
    notebook.run_all()
    panel = notebook.page.locator(".qlora-answers")
    panel.locator("button.qlora-ask").click()
    for side in ("left", "right"):
        expect(panel.locator(f".qlora-answer-{side}")).to_contain_text(re.compile("ended by|cut off"), timeout=120_000)
    picture(notebook, panel, "answers")
    rows = notebook.page.locator(".qlora-rows")
    rows.locator(".qlora-whole-sequence input").check()
    expect(rows.locator(".qlora-bound").nth(1)).to_be_attached()
    picture(notebook, rows, "rows")


def test_a_run_half_way(lab, opened, picture):
    cells = [
        "from qlora_helpers import workflow\nfrom qlora_helpers.runs.launch import start\n"
        "from qlora_helpers.views.widgets import watch",
        f"run = workflow.open_run('falcon-tiny', profile='tiny', settings={WATCHED})\nstart(run)",
        "watch(run, start)",
    ]
    notebook = opened(lab.add_notebook("half-way.ipynb", cells))
    notebook.run_all()
    run, panel = Run(lab.runs / "falcon-tiny"), notebook.page.locator(".qlora-watch")
    try:
        expect(panel.locator(".qlora-state")).to_contain_text(re.compile(r"step (9\d|1\d\d) of"), timeout=400_000)
        picture(notebook, panel, "watch")
        panel.locator("button.qlora-stop").click()
        expect(panel.locator(".qlora-state")).to_contain_text("stopped")
    finally:
        end(run)
