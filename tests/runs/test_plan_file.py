"""`plan.json` is added to, and read as checked values."""

from __future__ import annotations

import pytest

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.runs.plan_file import PlanFile, add_to_plan, read_plan

MEASURED = {
    "peak_gib": {"cuda:0": 3},
    "seconds": 2.5,
    "tokens_per_s": 100.0,
    "steps": 4,
    "trainable_parameters": 10,
    "parameters": 20,
    "published_parameters": 10,
    "machine": "CPU",
    "versions": {"torch": "2"},
}


def test_a_run_without_a_plan_has_an_empty_one(run):
    assert read_plan(run) == PlanFile()


def test_values_are_added_and_others_are_kept(run):
    add_to_plan(run, measured=MEASURED, later={"unknown": 1})
    add_to_plan(run, reload={"prompts": 3, "largest_difference": None, "same_answers": 3}, demo_seconds=60)
    assert read_json(run.plan_path)["later"] == {"unknown": 1}
    plan = read_plan(run)
    assert (plan.measured.peak_gib, plan.measured.reserved_gib, plan.measured.fast_step) == ({"cuda:0": 3.0}, {}, ())
    assert (plan.reload.same_answers, plan.reload.largest_difference, plan.demo_seconds) == (3, None, 60.0)
    assert plan.predicted is None and plan.out_of_memory is None


def test_a_plan_that_is_not_an_object_is_not_overwritten(run):
    write_json(run.plan_path, [1])
    with pytest.raises(RunError, match=r"plan\.json is damaged .*Delete it and train again"):
        add_to_plan(run, demo_seconds=1)
    assert read_json(run.plan_path) == [1]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"measured": {"peak_gib": {}}}, "measured: seconds is missing"),
        ({"measured": MEASURED | {"steps": "4"}}, "measured: steps: expected a whole number, got '4'"),
        ({"out_of_memory": {"where": "loss", "next": ["a=1"]}}, "out_of_memory: next: 1: expected a list, got 'a=1'"),
    ],
)
def test_a_wrong_value_is_named(run, values, problem):
    write_json(run.plan_path, values)
    with pytest.raises(RunError) as caught:
        read_plan(run)
    assert f"plan.json is damaged ({problem})" in str(caught.value)
