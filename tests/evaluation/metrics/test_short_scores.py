"""Short answers and numbers, by hand."""

from __future__ import annotations

import pytest

from qlora_helpers.evaluation.metrics.exact import EXACT
from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.metrics.numbers import decimal_sign, is_identifier, number_of, numbers_metric


@pytest.mark.parametrize(
    ("answer", "reference", "equal", "f1"),
    [
        ("Marie Curie", "marie curie.", 100, 100),
        ("Curie", "Marie Curie", 0, 100 * 2 / 3),
        ("C", "C++", 0, 100),  # signs are not words, but they are part of the answer
        ("北京", "北京", 100, 100),
        ("北海", "北京", 0, 50),
        ("running", "runs", 0, 0),
        ("", "x", 0, 0),
        ("👍", "👍", 100, None),
    ],
)
def test_short_answers_by_hand(answer, reference, equal, f1):
    (row,) = EXACT.score([answer], [[reference]])
    assert row["exact_match"] == equal
    assert row["token_f1"] == (None if f1 is None else pytest.approx(f1))


@pytest.mark.parametrize(
    ("text", "value", "with_comma"),
    [
        ("42", 42, 42),
        ("-1,234.5", -1234.5, None),
        ("1.234,5", None, 1234.5),
        ("3,5", None, 3.5),
        ("1,234", 1234, 1.234),
        ("$12.50", 12.5, None),
        ("12 €", 12, 12),
        ("−3 %", -3, -3),
        ("1 234 567", 1234567, 1234567),
        ("1'234.5", 1234.5, None),
        ("1e3", 1000, 1000),
        (".5", 0.5, None),
        ("7.", 7, 7),
        ("٤٢", 42, 42),
        ("１２", 12, 12),
        ("12,34,56", None, None),
        ("42 apples", None, None),
        ("between 1 and 2", None, None),
        ("1e999", None, None),
        ("9e307", None, None),  # two of them would be infinitely far apart
        ("nan", None, None),
        ("", None, None),
        ("%", None, None),
        ("e5", None, None),
    ],
)
def test_which_texts_are_numbers(text, value, with_comma):
    assert (number_of(text), number_of(text, ",")) == (value, with_comma)


def test_a_long_run_of_white_space_is_read_once():
    """Three runs of optional white space in a row would try 10^10 ways to share it."""
    assert number_of(" " * 100_000 + "x") is None
    assert number_of("1" + " " * 100_000 + "x") is None


def test_the_decimal_sign_is_that_of_all_texts():
    assert decimal_sign(["1,234", "5"]) == "."
    assert decimal_sign(["1,50", "1.234"]) == ","
    assert decimal_sign(["1,50", "1.5"]) is None


def test_digits_that_name_something_are_no_numbers():
    assert is_identifier("01067") and is_identifier("4006381333931001")
    assert not is_identifier("0") and not is_identifier("0.5") and not is_identifier("1,000,000")


def test_numbers_by_hand():
    rows = numbers_metric(tolerance=0.1).score(["110", "111", "about 100", "-100"], [["100"]] * 4)
    assert [row["number_right"] for row in rows] == [100, 0, 0, 0]
    assert measure_of("absolute_error").of(rows) == pytest.approx((10 + 11 + 200) / 3)
    assert measure_of("is_number").of(rows) == 75
    (exact,) = numbers_metric().score(["0.30000000000000004"], [["0.3"]])
    assert exact["number_right"] == 100
    (zero,) = numbers_metric(0.5).score(["0.1"], [["0"]])
    assert zero["number_right"] == 0
    (nothing,) = numbers_metric().score(["1"], [["unknown"]])
    assert nothing["number_right"] is None


def test_the_nearest_of_several_references_counts():
    (row,) = numbers_metric().score(["5"], [["1", "5"]])
    assert (row["number_right"], row["absolute_error"]) == (100, 0)
