"""Every solution is right, an untouched answer is not tried, and a wrong one gets the sentence that names its misconception."""

from __future__ import annotations

import json
import re

import pytest

from qlora_helpers.teaching import exercises
from qlora_helpers.teaching.exercise import KINDS, Exercise, Wrong, call
from tests.teaching.solutions import SOLUTIONS
from tests.teaching.wrong_answers import ON_FILES, WRONG

ALL = exercises.all_exercises()
CASES = [(name, code) for name, exercise in ALL.items() for code in exercise.misconceptions]


def answer(name, value, folder):
    return value(folder) if name in ON_FILES else value


def test_every_exercise_has_a_solution_hints_and_a_wrong_answer_for_each_misconception():
    assert set(SOLUTIONS) == set(WRONG) == set(ALL)
    for name, exercise in ALL.items():
        assert exercise.name == name
        assert exercise.kind in KINDS
        assert 2 <= exercise.minutes <= 15
        assert len(exercise.hints) >= 2
        assert set(WRONG[name]) == set(exercise.misconceptions)


@pytest.mark.parametrize("name", ALL)
def test_the_solution_is_right(name, tmp_path):
    outcome = ALL[name].check(answer(name, SOLUTIONS[name], tmp_path))
    assert outcome.is_right, outcome


@pytest.mark.parametrize(("name", "code"), CASES)
def test_a_wrong_answer_gets_its_own_message(name, code, tmp_path):
    outcome = ALL[name].check(answer(name, WRONG[name][code], tmp_path))
    assert (outcome.verdict, outcome.misconception) == ("wrong", code)
    assert not re.search(r"(?<!\{)\{[a-z]+\}", outcome.message), "a fact is missing"


def test_no_two_misconceptions_share_a_message():
    texts = [text for exercise in ALL.values() for text in exercise.misconceptions.values()]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("name", ALL)
def test_an_untouched_answer_is_not_tried(name):
    for untouched in (..., None):
        outcome = ALL[name].check(untouched)
        assert outcome.verdict == "not tried"
        assert ALL[name].question in outcome.message


def test_a_file_as_it_was_written_is_not_tried_and_stays(tmp_path):
    path = exercises.broken_file(tmp_path)
    assert ALL["repair_a_file"].check(path).verdict == "not tried"
    path.write_text("mine")
    assert exercises.broken_file(tmp_path).read_text() == "mine"


def one(**changes):
    def judge(value):
        if value == 1:
            raise Wrong("one")
        if value == 2:
            raise Wrong(message="Two is no answer.")
        return "Three it is."

    values = {
        "name": "sample",
        "title": "A sample",
        "kind": "judge",
        "minutes": 2,
        "question": "Which number?",
        "judge": judge,
        "misconceptions": {"one": "You counted from one."},
        "hints": ("Not one.", "Nor two."),
        "solution_is": "Three.",
    }
    return Exercise(**(values | changes))


def test_the_solution_opens_after_two_wrong_answers_and_survives_a_new_kernel(learner):
    assert "after 2 more answers" in repr(one().solution())
    one().check(1)
    assert "after 1 more answer." in repr(one().solution())
    one().check(...)  # not tried: opens nothing
    assert "after 1 more answer." in repr(one().solution())
    one().check(2)
    assert repr(one().solution()) == "Solution: Three."


def test_the_solution_is_open_for_a_teacher_and_for_who_has_it(monkeypatch):
    one().check(3)
    assert "Three." in repr(one().solution())
    assert "Not yet" in repr(one(name="other").solution())
    monkeypatch.setenv("QLORA_TEACHER", "1")
    assert "Three." in repr(one(name="other").solution())


def test_hints_come_one_after_another():
    assert "Hint 1 of 2: Not one." in repr(one().hint())
    assert "Hint 2 of 2: Nor two." in repr(one().hint())
    assert "Hint 2 of 2" in repr(one().hint())
    assert "this exercise has 2" in repr(one().hint(3))


def test_a_line_is_kept_for_each_check_and_holds_no_code_and_no_name(learner, monkeypatch):
    monkeypatch.setenv("QLORA_SEAT", "7")
    for value in (..., 1, 3):
        one().check(value)
    lines = [json.loads(line) for line in (learner / "attempts.jsonl").read_text().splitlines()]
    assert [(line["outcome"], line["misconception"], line["tries"]) for line in lines] == [
        ("not tried", "", 0),
        ("wrong", "one", 1),
        ("right", "", 2),
    ]
    assert all(
        set(line) == {"seat", "exercise", "outcome", "misconception", "tries", "minutes", "time"} for line in lines
    )
    assert {line["seat"] for line in lines} == {"7"}


def test_broken_lines_are_passed_over(learner):
    one().check(1)
    with open(learner / "attempts.jsonl", "ab") as file:
        file.write(b'{"seat": 1}\n\xff\n[]\n{"seat": "a", "exercise": "sample", "outcome": "wrong", "misc')
    one().check(2)
    assert "after 1 more" in repr(one().solution())  # the last line went into the broken one, and costs a try at most


def test_a_folder_that_cannot_be_written_costs_the_line_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_LEARNER", str(tmp_path / "file"))
    monkeypatch.setenv("QLORA_SEAT", "1")
    assert one().check(3).is_right


def test_a_function_that_raises_is_named_with_its_line():
    def broken(value):
        first = value
        return first / 0

    with pytest.raises(Wrong) as caught:
        call(broken, 1)
    assert caught.value.message == "Your function raised ZeroDivisionError in its line 3: division by zero"
    with pytest.raises(Wrong) as caught:
        call(3)
    assert "Hand over the function itself" in caught.value.message


def test_outcomes_show_as_text_and_as_safe_html():
    outcome = one().check(2)
    assert repr(outcome) == "WRONG: Two is no answer."
    assert "Two is no answer." in outcome._repr_html_()
    spoilt = one(judge=lambda value: "<script>").check(1)
    assert "<script>" not in spoilt._repr_html_()
