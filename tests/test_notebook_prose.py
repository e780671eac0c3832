"""The texts of notebooks 05 to 10: short on average, and an answer is hidden until the reader has committed a prediction."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
CHECKED = [path for path in NOTEBOOKS if "05" <= path.stem[:2] <= "10"]


@pytest.fixture(name="cells", params=CHECKED, ids=lambda path: path.stem)
def _cells(request):
    cells = json.loads(request.param.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def test_six_notebooks_are_checked():
    assert [path.stem[:2] for path in CHECKED] == ["05", "06", "07", "08", "09", "10"]


def test_texts_have_ninety_words_on_average(cells):
    assert mean(len(cell["source"].split()) for cell in cells if cell["cell_type"] == "markdown") <= 90


def test_an_answer_is_hidden_until_a_prediction_is_made(cells):
    asked = [at for at, cell in enumerate(cells) if "**Your prediction" in cell["source"]]
    assert len(asked) >= 4
    for at in asked:
        assert re.search(r"^my_\w+(, \w+)* = ", cells[at + 1]["source"], re.MULTILINE), "a place for the answer"
        stored = [cell for cell in cells[at + 1 : at + 3] if cell.get("outputs")]
        hidden = [cell["metadata"].get("jupyter", {}).get("outputs_hidden") for cell in stored]
        assert any(hidden) or not stored, "the answer is in plain sight"
        assert "<details>" not in cells[at]["source"].rpartition("**Your prediction")[2]
