"""Which metric fits: chosen by the answers, said in words, changed by a setting or a function."""

from __future__ import annotations

import json

import pytest

from qlora_helpers.base.config import DataConfig, EvaluationConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.evaluation.metrics.choose import choose, metric_for
from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.metrics.own import own_metric

SENTENCE = "We are sorry for the delay, and number {} of your parcels will be sent again tomorrow morning."
CASES = {
    "labels": [["billing", "delivery", "returns"][number % 3] for number in range(60)],
    "json": [json.dumps({"id": number, "tags": []}) for number in range(30)],
    "numbers": [f"{number * 37 / 4:.2f}" for number in range(40)],
    "exact": [f"Person {number}" for number in range(40)],
    "text": [SENTENCE.format(number) for number in range(40)],
}


@pytest.mark.parametrize("name", CASES)
def test_the_answers_choose(name):
    choice = choose(CASES[name])
    assert choice.name == name
    assert choice.reason


def test_reasons_name_what_was_seen():
    assert (
        "60 training answers have only 3 different texts ('billing', 'delivery', 'returns')"
        in choose(CASES["labels"]).reason
    )
    assert choose(CASES["json"]).reason == "all 30 training answers are JSON objects"
    assert choose(CASES["json"] + ["see above"]).reason == "30 of 31 training answers are JSON objects"


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        ([], "text"),
        (["Bo is late", "Ann pays"], "text"),  # too few to tell
        ([f"{number:05}" for number in range(1000, 1040)], "exact"),  # postcodes
        (["0", "1"] * 30, "labels"),
        ([f"{number},50" for number in range(40)], "numbers"),
        ([f"2026-01-{number:02}" for number in range(1, 31)], "exact"),
        ([f"今天{number}号下午三点在会议室开会，请大家准时参加" for number in range(40)], "text"),
        ([f"北京{number}" for number in range(40)], "exact"),
        ([*["yes", "no"] * 20, "a different answer every time " * 5], "exact"),
        (["[1, 2]"] * 10, "text"),
    ],
)
def test_cases_at_the_border(answers, name):
    assert choose(answers).name == name


def test_the_embedded_corpus_is_text():
    assert choose([item.answer for item in read_corpus(DataConfig()).train]).name == "text"


def test_a_setting_and_a_function_go_before_the_choice():
    labels = CASES["labels"]
    assert metric_for(EvaluationConfig(), labels)[0].name == "labels"
    assert metric_for(EvaluationConfig(metric="text"), labels)[0].name == "text"
    metric, reason = metric_for(EvaluationConfig(), (), labels)
    assert metric.name == "labels" and "held-out answers" in reason
    metric, reason = metric_for(
        EvaluationConfig(metric="text"), labels, labels, function=lambda one, other: one == other
    )
    assert (metric.name, reason) == ("function", "you passed it")
    comma = metric_for(EvaluationConfig(metric="numbers"), ["1,5", "2,25"])[0]
    assert comma.score(["1,5"], [["1,50"]])[0]["number_right"] == 100


# a function of the user's


def same_length(answer, reference):
    return len(answer) == len(reference)


def test_a_function_scores():
    metric = own_metric(same_length, ["abc"])
    assert metric.main == "user_same_length" and measure_of(metric.main).name == "same_length"
    assert metric.score(["abc", "x"], [["xyz"], ["xyz", "y"]]) == [{metric.main: 1}, {metric.main: 1}]
    several = own_metric(lambda answer, reference: {"a": 1, "b": None}, ["x"])
    assert several.measures == ("user_a", "user_b") and several.main == "user_a"
    assert several.score(["x"], [["y"]]) == [{"user_a": 1, "user_b": None}]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda answer, reference: 1 / 0, "ZeroDivisionError"),
        (lambda answer: 1, "TypeError"),
        (lambda answer, reference: "good", "ValueError"),
        (lambda answer, reference: float("nan"), "not a finite number"),
        (lambda answer, reference: None, "gives no score"),
    ],
)
def test_a_function_that_can_t_work_is_refused_before_anything_is_asked(function, message):
    with pytest.raises(UserError, match=message):
        own_metric(function, ["a reference"])


def test_a_function_that_fails_on_an_answer_costs_that_answer_alone():
    metric = own_metric(lambda answer, reference: float(answer), ["1", "2"])
    good, bad = metric.score(["3", "three"], [["3"], ["3"]])
    assert good == {metric.main: 3}
    assert bad[metric.main] is None and "ValueError" in bad["score_error"]
