"""What all notebooks have in common; that they run is nbval's business."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path
from statistics import mean

import nbformat
import pytest
from run_all import notebook_jobs
from store_notebooks import is_worth_storing

import qlora_helpers

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_twelve_in_order_and_a_primer_and_a_start_page():
    names = [path.stem.partition("_")[0] for path in NOTEBOOKS]
    assert names == [*(f"{number:02d}" for number in range(12)), "primer", "start"]


def test_make_lab_opens_the_start_page_which_leads_to_every_other_notebook():
    root = Path(__file__).parent.parent
    assert "default_url=/lab/tree/notebooks/start.ipynb" in (root / "Makefile").read_text(encoding="utf-8")
    cells = nbformat.read(root / "notebooks" / "start.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = set(re.findall(r"\]\(([^)#]+)\)", text))
    assert {path.name for path in NOTEBOOKS} - {"start.ipynb"} <= links
    assert all((root / "notebooks" / link).exists() for link in links)


def test_a_tried_notebook_writes_into_nobody_s_home_and_sends_nothing():
    for job in notebook_jobs("tiny"):
        assert {"QLORA_LEARNER", "QLORA_RUNS", "JUPYTER_DATA_DIR"} <= set(job.environment)
        assert job.environment["QLORA_BOARD"] == ""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_short_with_outputs_and_closing_assertions(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) <= 40
    assert max(len(cell.source.splitlines()) for cell in code) <= 17
    assert any("assert " in cell.source for cell in code[-2:])
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert notebook.metadata.kernelspec.name == "python3"


def test_texts_have_at_most_90_words_a_cell_on_average(notebook):
    words = [len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown"]
    assert mean(words) <= 90, f"{sum(words)} words in {len(words)} cells"


def test_nothing_stored_names_a_machine(notebook):
    stored = nbformat.writes(notebook)
    assert not re.search(r"/(home|root|Users)/(?!sagemaker-user|ec2-user)\w", stored)
    assert "widget-view+json" not in stored


def names_of(notebook) -> set[tuple[str, str]]:
    """Module and attribute of all that a notebook's code takes from the package, such as `("qlora_helpers", "train")`."""
    found, modules = set(), {}
    source = "\n".join(
        line if not line.lstrip().startswith(("%", "!")) else re.sub(r"[%!].*", "pass", line)
        for cell in notebook.cells
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
    )
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "qlora_helpers":
                    modules[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qlora_helpers":
            for alias in node.names:
                found.add((node.module, alias.name))
                if is_module(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found.add((modules[node.value.id], node.attr))
    return found


def is_module(name: str) -> bool:
    """Whether there is a module of that name; what it is in must exist."""
    parent = importlib.import_module(name.rpartition(".")[0])
    return hasattr(parent, "__path__") and importlib.util.find_spec(name) is not None


def test_the_names_that_it_takes_from_the_package_exist(notebook):
    names = names_of(notebook)
    assert len(names) >= 5
    faces = {("qlora_helpers", name) for name in qlora_helpers.__all__}
    assert not [
        f"{module}.{name}"
        for module, name in sorted(names - faces)
        if not is_module(f"{module}.{name}")
        and (module == "qlora_helpers" or not hasattr(importlib.import_module(module), name))
    ]


def test_a_name_that_a_notebook_misspells_is_found():
    cell = nbformat.v4.new_code_cell(
        "%pip list\nimport qlora_helpers as ql\nfrom qlora_helpers.runs import opening\nql.trian()\nopening.open_rum()"
    )
    names = names_of(nbformat.v4.new_notebook(cells=[cell]))
    assert names == {
        ("qlora_helpers", "trian"),
        ("qlora_helpers.runs", "opening"),
        ("qlora_helpers.runs.opening", "open_rum"),
    }


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
