"""A conversation in the answer panel by the keyboard alone, with a model that is loaded by the first question; and an evaluation in
the background, to which a page that was closed comes back."""

from __future__ import annotations

import re

from playwright.sync_api import expect

PREPARE = """\
import torch
import qlora_helpers as ql
from qlora_helpers.export.adapter import save_adapter
from qlora_helpers.model.run_model import RunModel
settings = {"data.train_rows": 4, "data.eval_rows": 1, "data.test_rows": 3, "evaluation.max_new_tokens": 24}
for name in ("talk", "talk-2"):
    run = ql.open_run(name, profile="tiny", settings=settings)
    loaded = ql.load(run, say=str)
    model = ql.add_adapters(run, loaded)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(key) + len(name)))
    ql.prepare_data(run, loaded.tokenizer, shape=loaded.shape, say=str)
    save_adapter(RunModel(run, model, loaded))"""
SHOW = """\
panel = ql.playground(ql.existing_run("talk"), "talk-2")
assert not panel.asking.answer.loaded
panel"""

EVALUATE = """\
panel = ql.evaluation_panel(ql.existing_run("kept"), rivals=["kept-2"])
panel"""


def test_a_conversation_by_the_keyboard_alone(lab, opened, picture):
    notebook = opened(lab.add_notebook("talk.ipynb", [PREPARE, SHOW]))
    page = notebook.page
    notebook.run_all()
    panel = page.locator(".qlora-answers")
    box = panel.locator(".qlora-dialogue textarea")
    expect(box).not_to_have_value("")  # it shows itself, and its first row, before the model is loaded
    picture(notebook, panel, "playground")
    panel.locator(".qlora-pick select").focus()
    page.keyboard.press("Tab")
    expect(box).to_be_focused()
    page.keyboard.press("Control+Enter")
    for side in ("left", "right"):
        expect(panel.locator(f".qlora-answer-{side}")).to_contain_text(
            re.compile("cut off at 24 tokens|ended by itself")
        )
    cells = page.evaluate("() => notebook.content.widgets.length")
    assert cells == 2, "the keys went to the panel and not to the notebook"
    expect(box).to_be_focused()
    page.keyboard.type("Ann: and tomorrow?")
    page.keyboard.press("Control+Enter")
    expect(panel.locator(".qlora-answer-left .qlora-asked").nth(1)).to_have_text(
        "Ann: and tomorrow?"
    )  # to the last key
    expect(panel.locator(".qlora-answer-right .qlora-said").nth(1)).not_to_be_empty()
    left = panel.locator(".qlora-answer-left")
    expect(left).to_contain_text("single questions")
    expect(panel.locator("button.qlora-vote-right")).to_be_enabled()
    panel.locator("button.qlora-new").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.classList.contains('qlora-vote-right')"):
            break
    page.keyboard.press("Enter")
    expect(panel.locator(".qlora-votes")).to_contain_text("1 vote between untuned and tuned")
    expect(left).to_contain_text("voted: the right answer")
    panel.locator(".qlora-model-left select").select_option(label="run talk-2")
    expect(left).to_contain_text("answers of another model than is chosen now")
    picture(notebook, panel, "conversation")
    panel.locator("button.qlora-again").click()
    expect(left).to_contain_text("run talk-2")
    expect(panel.locator(".qlora-answer-left .qlora-said").nth(1)).not_to_be_empty()
    assert notebook.kernel("print(len(ql.read_votes(ql.existing_run('talk')).votes))").strip() == "1"


def test_a_closed_page_comes_back_to_an_evaluation(lab, opened, picture):
    notebook = opened(lab.add_notebook("evaluation.ipynb", [PREPARE.replace("talk", "kept"), EVALUATE]))
    page = notebook.page
    notebook.run_all()
    panel = page.locator(".qlora-evaluation")
    expect(panel.locator(".qlora-state")).to_contain_text("not evaluated yet")
    panel.locator("button.qlora-evaluate").focus()
    page.keyboard.press("Enter")
    expect(panel.locator(".qlora-state")).to_contain_text("starting")
    notebook.reload()
    notebook.kernel("del panel")
    notebook.run_cell(1)
    panel = page.locator(".qlora-evaluation")
    expect(panel.locator(".qlora-scorecard")).to_contain_text("run kept-2", timeout=180_000)
    picture(notebook, panel, "evaluation")
