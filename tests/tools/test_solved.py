"""Every exercise stands in its notebook once; a student's copy is untouched and not tried, and a solved one is right."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nbformat
import pytest

from qlora_helpers.base.errors import UserError
from qlora_helpers.teaching import exercises

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("solved", ROOT / "tools" / "solved.py")
solved = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(solved)
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
NO_CELL_YET: set[str] = set()
NEEDS_A_MODEL = {"really_four_bits"}  # the solution's check loads one; tests/teaching runs it


def cells_of(notebook):
    """Exercise -> the source of its cell."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return {name: source for source in code for name in solved.checked(source)}


@pytest.fixture
def learner(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LEARNER", str(tmp_path / "learner"))
    monkeypatch.setenv("QLORA_RUNS", str(tmp_path / "runs"))
    return tmp_path


def test_every_exercise_stands_in_its_own_notebook_once():
    found = [(stem, name) for stem, notebook in NOTEBOOKS.items() for name in cells_of(notebook)]
    wanted = [(stem, each.name) for stem, several in exercises.BY_NOTEBOOK.items() for each in several]
    assert len(found) == len(set(found))
    assert set(found) <= set(wanted)
    assert {name for _, name in set(wanted) - set(found)} <= NO_CELL_YET


def outcomes(notebook, folder):
    """Runs the cells of a notebook's exercises, one namespace for all, and returns what their checks say by exercise."""
    import qlora_helpers as ql
    from qlora_helpers.base.config import DataConfig
    from qlora_helpers.data.sources import read_corpus

    space = {"ql": ql, "read_corpus": read_corpus, "DataConfig": DataConfig}
    found = {}
    for name, source in cells_of(notebook).items():
        if name not in NEEDS_A_MODEL:
            *lines, last = source.splitlines()
            exec("\n".join([*lines, f"_outcome = {last}"]), space)
            found[name] = space["_outcome"]
    return found


@pytest.mark.parametrize("stem", exercises.BY_NOTEBOOK)
def test_the_solved_copy_is_right_and_the_student_s_is_not_tried(stem, learner, torch, capsys):
    notebook = NOTEBOOKS[stem]
    untouched = outcomes(solved.student(notebook), learner)
    assert {each.verdict for each in untouched.values()} <= {"not tried"}
    done = outcomes(solved.solved(notebook), learner)
    assert set(done) == set(untouched)
    assert [str(each) for each in done.values() if not each.is_right] == []


def test_a_solved_copy_has_no_dots_and_marks_what_it_changed():
    for stem, several in exercises.BY_NOTEBOOK.items():
        made = cells_of(solved.solved(NOTEBOOKS[stem]))
        for each in several:
            if each.name in made:
                assert "# solution" in made[each.name]
                assert "= ..." not in made[each.name] and "return ..." not in made[each.name]


def test_outputs_are_cleared_and_all_else_stays():
    before = NOTEBOOKS["03_prepare_data"]
    for made in (solved.student(before), solved.solved(before)):
        assert not any(cell.get("outputs") for cell in made.cells)
        assert [cell.id for cell in made.cells] == [cell.id for cell in before.cells]
        changed = [a.source for a, b in zip(before.cells, made.cells, strict=True) if a.source != b.source]
        assert all("exercises." in source for source in changed)
    assert any(cell.get("outputs") for cell in before.cells), "the original is untouched"


def test_notebooks_are_written_whole_and_unknown_names_are_refused(tmp_path):
    written = solved.write_notebooks(tmp_path, ["primer"])
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "student/primer.ipynb",
        "solved/primer.ipynb",
    ]
    for path in written:
        nbformat.validate(nbformat.read(path, as_version=4))
    assert solved.main([str(tmp_path), "nothing"]) == 2
    assert solved.main([]) == 2


def test_a_stub_that_is_gone_and_an_exercise_that_does_not_exist_are_refused():
    with pytest.raises(UserError, match="no function with dots"):
        solved.solved_cell("exercises.quantise.check(1)", exercises.quantise)
    with pytest.raises(UserError, match="no such exercise"):
        solved.exercise_of("nothing")
