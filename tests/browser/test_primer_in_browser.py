"""The primer as a reader sees it: answers are hidden until they are asked for, and pictures are drawn."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect


@pytest.fixture
def notebook(opened):
    return opened("primer.ipynb")


def cell_with(notebook, text):
    """The cell whose source holds a text, scrolled into view."""
    number = notebook.page.evaluate(
        "text => notebook.content.model.toJSON().cells.findIndex(cell => [cell.source].flat().join('').includes(text))",
        text,
    )
    notebook.page.evaluate("number => notebook.content.scrollToItem(number)", number)
    return number, notebook.page.locator(f'.jp-Notebook .jp-Cell[data-windowed-list-index="{number}"]')


def test_an_answer_shows_once_its_cell_has_run_and_its_reason_once_it_is_opened(notebook):
    number, cell = cell_with(notebook, "my_probability = None")
    expect(cell).to_be_visible()
    assert "0.143" not in cell.inner_text(), "the stored answer is in plain sight"
    for code in (1, 3, number):
        notebook.run_cell(code)
    expect(cell.locator(".jp-OutputArea")).to_contain_text("0.143")
    _, why = cell_with(notebook, "Equal scores give equal probabilities")
    rendered = why.locator(".jp-RenderedMarkdown")
    reason = rendered.get_by_text("Equal scores give equal probabilities")
    expect(reason).to_be_hidden()
    rendered.get_by_text("Why?").click()
    expect(reason).to_be_visible()


def test_its_pictures_are_drawn_and_described(notebook):
    _, cell = cell_with(notebook, "drawings.training_loop()")
    image = cell.get_by_alt_text("The training loop.")
    expect(image).to_be_visible()
    assert image.evaluate("image => image.complete && image.naturalWidth >= 700")
