"""What a workshop hands out: the lessons' minutes add up, every exercise is in one, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest

from qlora_helpers.base.errors import UserError
from qlora_helpers.teaching.exercises import all_exercises

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("workshop", ROOT / "tools" / "workshop.py")
workshop = importlib.util.module_from_spec(SPEC)
sys.modules["workshop"] = workshop  # its dataclasses look their module up
SPEC.loader.exec_module(workshop)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("workshop") / "build"
    assert workshop.main([str(out)]) == 0
    return out


def test_every_exercise_is_in_a_lesson_and_minutes_add_up():
    lessons = workshop.read_lessons()
    assert [(each.name, each.minutes) for each in lessons] == [("90-minutes", 90), ("3-hours", 180), ("half-day", 240)]
    assert {name for lesson in lessons for part in lesson.parts for name in part.exercises} == set(all_exercises())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"stop_in_time"]', '"stop_on_time"]', "no exercise of 05_monitor"),
        ('"quantise"]', '"one_step"]', "no exercise of 01_load_model"),
        ("minutes = 90", "minutes = 91", "the parts take 90 minutes"),
    ],
)
def test_a_lesson_that_does_not_fit_the_exercises_is_refused(tmp_path, old, new, said):
    text = (ROOT / "workshop/labs/plans.toml").read_text(encoding="utf-8")
    (tmp_path / "plans.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        workshop.read_lessons(tmp_path / "plans.toml")


def test_everything_is_in_one_folder_and_links_lead_somewhere(built):
    assert {path.name for path in built.iterdir()} >= {"student", "solved", "labs", "instructor", "setup", "docs"}
    names = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert sorted(path.name for path in (built / "student").iterdir()) == names
    pages = [*(built / "labs").glob("*.md"), *(built / "instructor").glob("*.md"), *(built / "setup").glob("*.md")]
    pages += [ROOT / "workshop" / "README.md"]
    texts = [(path, path.read_text(encoding="utf-8")) for path in pages]
    for kind in ("student", "solved"):
        for path in (built / kind).glob("*.ipynb"):
            cells = nbformat.read(path, as_version=4).cells
            texts.append((path, "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")))
    broken = [
        f"{path.name}: {link}"
        for path, text in texts
        for link in LINK.findall(text)
        if not (path.parent / link).exists()
    ]
    assert broken == []


def test_a_lesson_s_page_says_what_to_do_when(built):
    page = (built / "labs" / "90-minutes.md").read_text(encoding="utf-8")
    assert (
        "| 10 | 14 | A loss and a step | [primer](../student/primer.ipynb) | The loss of one token (6); One step downhill (4) |"
        in page
    )
    assert all(each.question in page for each in (all_exercises()["quantise"], all_exercises()["stop_in_time"]))


def test_finished_runs_go_along_where_they_were_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workshop, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(workshop.solved, "write_notebooks", lambda folder: [])
    assert workshop.main([str(tmp_path / "without")]) == 0
    assert "`make shipped` trains it" in capsys.readouterr().out
    (tmp_path / "shipped" / "finished").mkdir(parents=True)
    (tmp_path / "shipped" / "MADE.json").write_text("{}")
    assert workshop.main([str(tmp_path / "with")]) == 0
    assert "make shipped" not in capsys.readouterr().out
    assert (tmp_path / "with" / "shipped" / "MADE.json").is_file()
