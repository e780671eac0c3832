"""What all ten notebooks have in common; that they run is nbval's business."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from store_notebooks import is_worth_storing

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_ten_in_order():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(10)]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_short_with_outputs_and_closing_assertions(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) <= 33
    assert max(len(cell.source.splitlines()) for cell in code) <= 17
    assert any("assert " in cell.source for cell in code[-2:])
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert notebook.metadata.kernelspec.name == "python3"


def test_nothing_stored_names_a_machine(notebook):
    stored = nbformat.writes(notebook)
    assert not re.search(r"/(home|root|Users)/(?!sagemaker-user|ec2-user)\w", stored)
    assert "widget-view+json" not in stored


def test_at_least_25_cells_are_compared_exactly():
    tags = [
        tag
        for path in NOTEBOOKS
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code" and cell.outputs
        for tag in cell.metadata.get("tags", [])
    ]
    assert tags.count("nbval-check-output") >= 25


def test_of_a_widget_its_still_version_is_stored_and_a_bare_view_is_not():
    view = "application/vnd.jupyter.widget-view+json"
    still = nbformat.v4.new_output("display_data", {view: {}, "text/plain": "a table", "text/html": "<table></table>"})
    assert is_worth_storing(still) and set(still.data) == {"text/plain", "text/html"}
    assert not is_worth_storing(nbformat.v4.new_output("display_data", {view: {}, "text/plain": "FloatProgress()"}))
    assert not is_worth_storing(nbformat.v4.new_output("stream", name="stderr", text="a bar"))
