"""The list of runs as a person uses it: filter, tick, compare, clone and delete, by mouse and by keyboard."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from fake_run import add_evaluation, evaluation_values, finished_run
from playwright.sync_api import expect

import qlora_helpers as ql
from qlora_helpers.base.files import write_json
from qlora_helpers.runs.folder import Run

CELLS = ["import qlora_helpers as ql\nql.list_runs('side-by-side')"]


@pytest.fixture
def notebook(lab, opened):
    for number, (name, r) in enumerate((("small", 8), ("medium", 32), ("large", 64))):
        run = finished_run(lab.folder / "side-by-side", name)
        run.save_config(run.config().with_settings({"adapter.r": r}))
        noise, own = random.Random(0), random.Random(number)
        rows = [
            {"id": f"row-{row}", "dialogue": f"d{row}", "summary": "s"}
            | {"answers": {"tuned": {"text": "t", "tokens": 1, "stopped": True, "rouge_l": value + 4 * (number > 0)}}}
            for row, value in enumerate(noise.gauss(27, 9) + own.gauss(0, 3) for _ in range(60))
        ]
        mean = sum(row["answers"]["tuned"]["rouge_l"] for row in rows) / len(rows)
        scores = evaluation_values()["scores"]
        scores["tuned"] |= {"rouge_l": mean, "low": mean - 2.2, "high": mean + 2.3}
        add_evaluation(run, rows=rows, scores=scores)
        spent = {
            "spent_s": 251.0 + 90 * number,
            "spent_usd": 0.15 * (number + 1),
            "heartbeat": 1_767_225_600.0 + 4000 * number,
        }
        write_json(run.status_path, json.loads(run.status_path.read_text()) | spent)
    damaged = finished_run(lab.folder / "side-by-side", "damaged")
    damaged.status_path.write_text("{")
    opened_notebook = opened(lab.add_notebook("runs.ipynb", CELLS))
    opened_notebook.run_all()
    return opened_notebook


def test_the_start_page_shows_where_to_begin_and_which_runs_there_are(lab, opened, page):
    base = finished_run(lab.runs, "begun")
    ql.sweep(base, {"adapter.r": [4, 8]}).write()
    notebook = opened("start.ipynb")
    notebook.run_all()
    panel = page.locator(".qlora-run-list")
    for name in ("begun", "begun-r4", "begun.sweep"):
        expect(panel.get_by_role("checkbox", name=name, exact=True)).to_be_visible()
    links = page.locator(".jp-RenderedMarkdown a[href*='.ipynb']")
    assert links.count() >= 10
    for name in ("begun", "begun-r4", "begun-r8", "begun.sweep"):
        shutil.rmtree(lab.runs / name)


def test_runs_are_filtered_compared_cloned_and_deleted(notebook, page, lab, picture):
    panel = page.locator(".qlora-run-list")
    names = panel.locator(".qlora-run .widget-checkbox")
    expect(names).to_have_count(4)
    panel.get_by_role("textbox", name="Filter").fill("r=64")
    panel.get_by_role("textbox", name="Filter").press("Enter")
    expect(names).to_have_count(1)
    panel.get_by_role("textbox", name="Filter").fill("")
    panel.get_by_role("textbox", name="Filter").press("Enter")
    expect(names).to_have_count(4)
    compare = panel.get_by_role("button", name="Compare")
    expect(compare).to_be_disabled()
    for name in ("small", "medium", "large"):
        panel.get_by_role("checkbox", name=name, exact=True).focus()
        page.keyboard.press("Space")
    picture(notebook, panel, "runs")
    compare.click()
    expect(panel.get_by_text("adapter.r", exact=True)).to_be_visible()
    expect(panel.get_by_text("has the best ROUGE-L")).to_contain_text("is better than")
    assert panel.evaluate("each => each.scrollWidth <= each.clientWidth + 1")

    panel.get_by_role("checkbox", name="medium", exact=True).uncheck()
    panel.get_by_role("checkbox", name="large", exact=True).uncheck()
    panel.get_by_role("button", name="Clone").click()
    panel.get_by_role("textbox", name="New name").fill("small-again")
    panel.get_by_role("button", name="Clone").last.click()
    expect(panel.get_by_role("checkbox", name="small-again")).to_be_visible()
    panel.get_by_role("button", name="Delete").click()
    panel.get_by_role("textbox", name="Its name").fill("Small")
    panel.get_by_role("button", name="Delete for ever").click()
    expect(panel.get_by_role("alert")).to_contain_text("nothing was deleted")
    panel.get_by_role("textbox", name="Its name").fill("small")
    panel.get_by_role("button", name="Delete for ever").click()
    expect(panel.get_by_role("checkbox", name="small", exact=True)).to_have_count(0)
    assert not Run(lab.folder / "side-by-side" / "small").exists()
