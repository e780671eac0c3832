"""The primer, 10 and 11 have short texts. In all notebooks a prediction is answered only after the reader has committed one.
The primer has no profile."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
PREDICTING = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb") if path.stem != "start")
# How many a notebook has at least; seven where nothing is said.
FEWER = {
    "00_setup": 3,
    "03_prepare_data": 6,
    "04_train": 6,
    "05_monitor": 4,
    "06_evaluate": 5,
    "07_scale_out": 4,
    "08_clean_up": 6,
    "11_leaving": 4,
}


@pytest.fixture(name="cells", params=["primer", "10_your_own_task", "11_leaving"])
def _cells(request):
    return nbformat.read(NOTEBOOKS / f"{request.param}.ipynb", as_version=4).cells


def test_it_is_short(cells):
    texts = [re.sub(r"\]\([^)]*\)|</?\w+>", "", cell.source) for cell in cells if cell.cell_type == "markdown"]
    assert len(cells) <= 36
    assert mean(len(re.findall(r"\w[\w.,’'-]*", text)) for text in texts) <= 90
    assert max(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code") <= 15


@pytest.mark.parametrize("name", PREDICTING)
def test_every_prediction_has_a_place_for_it_and_hides_its_answer(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    asked = [at for at, cell in enumerate(cells) if "**Your prediction" in cell.source]
    assert len(asked) >= FEWER.get(name, 7)
    for at in asked:
        prepares = re.search(r"%%capture|ql\.(watch|ConfigForm)\(", cells[at + 1].source)
        place = cells[at + 2 if prepares else at + 1]
        assert re.match(r"my_\w+(, my_\w+)* = ", place.source), "the answer's place is the cell's first line"
        shown = place if place.outputs else cells[at + 2]
        if "four_curves(named=False)" not in shown.source:  # which shows no answer
            assert shown.metadata.get("jupyter", {}).get("outputs_hidden"), "the answer is in plain sight"
            assert shown.outputs[0].text.startswith("you predicted: "), "JupyterLab shows a folded output's first line"
        assert "<details>" not in cells[at].source.rpartition("**Your prediction")[2]


def test_the_primer_says_the_same_in_every_profile():
    cells = nbformat.read(NOTEBOOKS / "primer.ipynb", as_version=4).cells
    assert not any("QLORA_PROFILE" in cell.source or "open_run" in cell.source for cell in cells)
