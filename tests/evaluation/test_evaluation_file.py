"""`evaluation.json` is read as checked plain values, also an older one."""

from __future__ import annotations

import pytest
from fake_run import add_evaluation, evaluation_values, fake_run

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.evaluation.evaluation_file import read_evaluation


def test_a_run_that_was_not_evaluated_has_no_values(run):
    assert read_evaluation(run) == {}


def test_values_are_read_as_they_were_written(tmp_path):
    run = fake_run(tmp_path)
    add_evaluation(run)
    assert read_evaluation(run) == read_json(run.evaluation_path)


def test_an_older_file_is_read_under_todays_names(tmp_path):
    run = fake_run(tmp_path)
    add_evaluation(run, left_out=["row 7"])
    found = read_evaluation(run)
    assert found["skipped"] == ["row 7"] and "left_out" not in found


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scores": {"base": {}}}, "scores: base: rouge1 is missing"),
        ({"rouge_l_gain": "much"}, "rouge_l_gain: expected a number, got 'much'"),
        ({"rows": [{"id": 1}]}, "rows: 1: id: expected a text, got 1"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, changes, problem):
    run = fake_run(tmp_path)
    write_json(run.evaluation_path, evaluation_values() | changes)
    with pytest.raises(RunError) as caught:
        read_evaluation(run)
    assert str(caught.value).endswith(f"evaluation.json is damaged ({problem}). Delete it and evaluate the run again.")
