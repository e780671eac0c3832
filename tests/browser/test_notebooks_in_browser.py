"""The notebooks as a person sees them, one after the other: 04 makes the run whose model 06 asks."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import expect

from qlora_helpers.base.text import plain
from qlora_helpers.runs.folder import Run

# How long the longest line of a live chart is, in pixels of the screen.
LENGTH_DRAWN = (
    "chart => Math.max(...[...chart.querySelectorAll('svg path')].map(path => path.getBoundingClientRect().width))"
)
ATTACK = '<img src=x onerror="window.attacked = true">'


@pytest.fixture
def run(lab):
    """The run of the notebooks."""
    return Run(lab.runs / "tiny")


def test_04_train(opened, run):
    notebook = opened("04_train.ipynb")
    page = notebook.page
    notebook.run_all()
    assert run.status().state == "finished"
    assert any(run.checkpoints_dir.glob("checkpoint-*/verified.json"))
    losses = page.get_by_role("img", name=re.compile("training loss from")).first
    losses.scroll_into_view_if_needed()
    assert losses.evaluate(LENGTH_DRAWN) > 100

    consequences = page.locator(".qlora-consequences")
    before = consequences.inner_text()
    page.locator(".qlora-field-train-micro_batch_size .noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    expect(consequences).not_to_have_text(before, use_inner_text=True)


def test_06_asks_both_models_what_a_person_types(opened, run):
    assert run.adapter_dir.exists(), "made by notebook 04, in the test before this one"
    notebook = opened("06_evaluate.ipynb")
    page = notebook.page
    notebook.run_all()
    panel = page.locator(".qlora-answers")
    panel.locator(".qlora-dialogue textarea").fill(f"Ana: are you coming?\nBo: {ATTACK} no, I work\nAna: pity")
    panel.locator(".noUi-handle").first.focus()  # temperature
    page.keyboard.press("End")
    panel.locator("button.qlora-ask").click()
    printed = notebook.kernel(
        "import json; panel.wait(); turn = panel.asking.turns[-1]\n"
        "print(json.dumps([{side: answer.text for side, answer in turn.answers.items()}, turn.question]))"
    )
    answers, asked = json.loads(printed)
    assert ATTACK in asked and set(answers) == {"left", "right"} and any(answers.values())
    for side, text in answers.items():
        shown = panel.locator(f".qlora-answer-{side}")
        expect(shown).to_contain_text(re.compile(r"ended by itself after|cut off at"))
        expect(shown.locator(".qlora-text")).to_contain_text(" ".join(plain(text).split()))
    assert_not_attacked(page)


def test_what_models_and_people_write_is_shown_and_never_run(lab, opened):
    """A model that answers with the dialogue: the shortest way for a tag to come back."""
    cells = [
        "from qlora_helpers.views.widgets import answer_panel\n"
        "def echo(asked, **settings):\n    yield from asked.turns[-1]",
        f"answer_panel(echo, [{{'id': 'a', 'dialogue': {('Ana: ' + ATTACK)!r}, 'summary': {('Sum: ' + ATTACK)!r}}}])",
    ]
    notebook = opened(lab.add_notebook("echo.ipynb", cells))
    page = notebook.page
    notebook.run_all()
    panel = page.locator(".qlora-answers")
    expect(panel).to_contain_text(f"Sum: {ATTACK}")
    panel.locator("button.qlora-ask").click()
    for side in ("left", "right"):
        expect(panel.locator(f".qlora-answer-{side} .qlora-said")).to_have_text(f"Ana: {ATTACK}")
    assert_not_attacked(page)


def assert_not_attacked(page) -> None:
    """No image of the attack is in the page, so its script can't run later either."""
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("() => window.attacked") is None
