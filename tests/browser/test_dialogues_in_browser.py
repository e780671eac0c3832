"""Panels that show what came from elsewhere: rows token by token, and answers. A tag in a dialogue is shown, not run."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import expect

ATTACK = '<img src=x onerror="window.attacked = true">'


@pytest.fixture
def notebook(lab, opened):
    """A run on dialogues of which each tries to run a script in the page of its reader."""
    rows = [
        {"dialogue": f"Ana: look {number} {ATTACK}\nBo: no", "summary": f"Ana shows {ATTACK}."} for number in range(12)
    ]
    (lab.folder / "attack.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ["data.source=attack.jsonl", "data.train_rows=8", "data.eval_rows=2", "data.test_rows=2"]
    cells = [
        "from qlora_helpers import workflow\nfrom qlora_helpers.views.widgets import row_browser",
        f"run = workflow.open_run('attacked', profile='tiny', settings={settings!r})\nloaded = workflow.load(run)\n"
        "data = workflow.prepare_data(run, loaded.tokenizer, shape=loaded.shape)",
        "row_browser(data, loaded.tokenizer)",
    ]
    notebook = opened(lab.add_notebook("dialogues.ipynb", cells))
    notebook.run_all()
    return notebook


def assert_not_attacked(page) -> None:
    assert page.locator("img[src=x]").count() == 0  # it would fail to load, and run its script, some time later
    assert page.evaluate("() => window.attacked") is None


def test_rows_token_by_token(notebook):
    page = notebook.page
    rows = page.locator(".qlora-rows")
    expect(rows).to_contain_text("train row 1 of 8")
    expect(rows).to_contain_text(ATTACK)
    colours = [
        rows.locator(kind).first.evaluate("token => getComputedStyle(token).backgroundColor")
        for kind in (".k-trained", ".k-masked", ".k-end")
    ]
    assert len(set(colours)) == 3
    rows.locator(".qlora-next").click()
    expect(rows).to_contain_text("train row 2 of 8")
    rows.locator(".qlora-search input").fill("LOOK")
    rows.locator(".qlora-search input").press("Enter")
    expect(rows).to_contain_text("2 of 8 rows with")
    rows.locator(".qlora-whole-sequence input").check()
    expect(rows.locator(".qlora-bound").nth(1)).to_be_visible()
    assert_not_attacked(page)


def test_a_text_is_no_formula(lab, opened):
    """JupyterLab's MathJax would draw it, and leave out what a formula hides."""
    text = r"costs $\phantom{hidden}$ $5 or \(10\)"
    cells = [
        f"text = {text!r}\nfrom qlora_helpers.base.tables import Table\nTable(['row'], [[text]], caption=text, notes=[text])",
        "from qlora_helpers.runs.status import Status\nfrom qlora_helpers.views.monitor import Watch\n"
        "Watch('run', Status(last_error=text), {})",
        "from IPython.display import HTML\nHTML(f'<p>{text}</p>')",
    ]
    notebook = opened(lab.add_notebook("formulas.ipynb", cells))
    notebook.run_all()
    outputs = notebook.page.locator(".jp-OutputArea-output")
    expect(outputs.nth(2).locator("mjx-container").first).to_be_attached()  # MathJax has come
    assert [outputs.nth(number).inner_text().count(text) for number in range(3)] == [3, 1, 0]
