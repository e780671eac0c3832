"""The form: a knob turned with the mouse or the keyboard, and what follows from it."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.runs.folder import Run


@pytest.fixture
def run(lab):
    """A run of Falcon-40B: its shape is catalogued, so nothing is downloaded."""
    run = Run(lab.runs / "formed")
    run.save_config(profile_config("falcon-40b"))
    return run


@pytest.fixture
def form(lab, opened, run):
    """The notebook with the form of that run, for an instance with four cards of 24 GB."""
    cells = ["from qlora_helpers import workflow\nfrom qlora_helpers.views.widgets import ConfigForm"]
    cells += ["ConfigForm(workflow.existing_run('formed'), gpus='ml.g5.12xlarge')"]
    notebook = opened(lab.add_notebook("form.ipynb", cells))
    notebook.run_all()
    notebook.page.locator(".qlora-form").wait_for()
    return notebook


def test_turn_a_knob_see_what_follows_and_save(form, run, picture):
    page = form.page
    consequences = page.locator(".qlora-consequences")
    expect(consequences).to_contain_text("55,541,760")
    expect(consequences).to_contain_text("Fits")
    picture(form, page.locator(".qlora-form"), "form")

    rank = page.locator(".qlora-field-adapter-r")
    rank.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    expect(consequences).to_contain_text("111,083,520")  # twice the rank, twice the parameters
    expect(rank.locator("input")).to_have_value("16")

    page.get_by_role("tab", name="Training").click()
    page.locator(".qlora-field-train-activation_checkpointing input").uncheck()
    expect(consequences).to_contain_text("Does not fit")
    over = page.locator(".qlora-over").first
    assert over.evaluate("bar => getComputedStyle(bar).color") != consequences.evaluate(
        "all => getComputedStyle(all).color"
    )
    consequences.get_by_role("button", name="Fix it").click()
    expect(consequences).not_to_contain_text("Does not fit")

    assert run.config().adapter.r == 8  # nothing is saved before it is asked for
    page.locator(".qlora-save-config").click()
    expect(page.locator(".qlora-form")).to_contain_text("Saved to formed")
    assert run.config().adapter.r == 16
    assert (
        "adapter.r=16"
        in page.locator(".qlora-code").inner_text() + page.locator(".qlora-code textarea").last.input_value()
    )


def test_a_wrong_number_is_told_and_never_saved(form, run):
    page = form.page
    rank = page.locator(".qlora-field-adapter-r input")
    rank.fill("0")
    rank.press("Enter")
    expect(page.locator(".qlora-form")).to_contain_text("adapter.r")
    expect(page.locator(".qlora-form")).to_contain_text("last valid settings")
    page.locator(".qlora-save-config").click()
    expect(page.locator(".qlora-form")).to_contain_text("Not saved")
    assert run.config().adapter.r == 8
    page.locator(".qlora-reset").click()
    expect(rank).to_have_value("8")
