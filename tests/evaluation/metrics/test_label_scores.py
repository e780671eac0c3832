"""Accuracy, macro-F1 and the confusion table, by hand."""

from __future__ import annotations

import pytest

from qlora_helpers.evaluation.metrics.labels import Labels, confusion, labels_metric
from qlora_helpers.evaluation.metrics.measures import measure_of


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("billing", "billing"),
        (" Billing.\n", "billing"),
        ('"billing"', "billing"),
        ("**billing**", "billing"),
        ("The label is billing", ""),
        ("billing, delivery", ""),
        ("", ""),
        ("ÜBERWEISUNG", "Überweisung"),
        ("退款。", "退款"),
    ],
)
def test_which_answers_are_a_label(answer, label):
    assert Labels(["billing", "delivery", "Überweisung", "退款"]).label(answer) == label


def test_labels_that_differ_in_case_alone_stay_apart():
    labels = Labels(["us", "US", "C", "C++", "c."])
    assert (labels.label("us"), labels.label("US"), labels.label("Us")) == ("us", "US", "")
    assert (labels.label("C++"), labels.label("c++"), labels.label("C")) == ("C++", "C++", "C")


EXPECTED = ["a", "a", "a", "a", "b", "b", "c"]
GIVEN = ["a", "a", "b", "what?", "b", "a", "a"]


def scored(answers, references, known=()):
    return labels_metric(known).score(answers, [[reference] for reference in references])


def test_accuracy_and_macro_f1_by_hand():
    """a: 2 right of 4 given and 4 expected; b: 1 of 2 and 2; c: 0 of 0 and 1."""
    rows = scored(GIVEN, EXPECTED)
    assert measure_of("accuracy").of(rows) == pytest.approx(100 * 3 / 7)
    assert measure_of("macro_f1").of(rows) == pytest.approx(100 * (1 / 2 + 1 / 2 + 0) / 3)
    assert measure_of("is_label").of(rows) == pytest.approx(100 * 6 / 7)


def test_the_majority_alone_has_a_low_macro_f1():
    rows = scored(["a"] * 10, ["a"] * 9 + ["b"])
    assert measure_of("accuracy").of(rows) == 90
    assert measure_of("macro_f1").of(rows) == pytest.approx(100 * (18 / 19) / 2)


def test_a_label_of_the_training_rows_is_a_label():
    (row,) = scored(["rare"], ["a"], known=["rare"])
    assert row == {"expected": "a", "predicted": "rare", "correct": 0, "is_label": 100}


def test_any_of_several_references_is_right():
    (row,) = labels_metric().score(["B"], [["a", "b"]])
    assert row == {"expected": "b", "predicted": "b", "correct": 100, "is_label": 100}


def test_the_confusion_table_by_hand():
    table = confusion(scored(GIVEN, EXPECTED))
    assert table.header == ["expected", "a", "b", "c", "(no label)"]
    assert table.rows == [["a", "2", "1", "0", "1"], ["b", "1", "1", "0", "0"], ["c", "1", "0", "0", "0"]]
    assert confusion([{"text": "no labels here"}]).rows == []
    other = confusion(scored(["rare", "a"], ["a", "a"], known=["rare"]))
    assert (other.header[-2:], other.rows) == (["another", "(no label)"], [["a", "1", "1", "0"]])


def test_many_labels_are_shown_in_part():
    names = [f"label {number:02}" for number in range(30)]
    table = confusion(scored(names, names))
    assert len(table.rows) == 20 and "20 most frequent of 30" in table.notes[0]
