"""Which training rows are kept for an evaluation: the same for the same data, of every label, short enough to fit."""

from __future__ import annotations

from qlora_helpers.data.examples import Message, one_turn
from qlora_helpers.data.shots import MOST_ANSWERS, MOST_SHOTS, kept_answers, kept_shots, with_shots


def rows(count, answer=lambda number: f"answer {number}", length=lambda number: number):
    return [one_turn(f"r{n}", f"line {n}", "x" * length(n), answer(n)) for n in range(count)]


def test_the_same_rows_and_seed_give_the_same_examples():
    train = rows(100)
    assert kept_shots(train, 1) == kept_shots(train, 1) != kept_shots(train, 2)
    assert len(kept_shots(train, 1)) == MOST_SHOTS
    assert kept_shots([], 0) == () and len(kept_shots(rows(1), 0)) == 1


def test_examples_come_from_the_shorter_half():
    assert all(len(item.prompt) <= 50 for item in kept_shots(rows(100), 0))


def test_every_label_comes_once_before_one_comes_again_the_most_frequent_first():
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    train = rows(100, lambda number: labels[number], lambda number: 5)
    found = [item.answer for item in kept_shots(train, 3)]
    assert found[:6] == ["a", "b", "c"] * 2
    assert len(set(kept_shots(train, 3))) == MOST_SHOTS


def test_answers_are_sampled_in_the_order_of_the_rows():
    few = rows(10)
    assert kept_answers(few, 0) == tuple(item.answer for item in few)
    many = kept_answers(rows(2000), 0)
    numbers = [int(answer.split()[1]) for answer in many]
    assert len(many) == MOST_ANSWERS and numbers == sorted(set(numbers)) and numbers[-1] > 1500
    assert kept_answers(rows(3, lambda number: "long " * 2000 * number), 0) == ()


def test_a_conversation_with_examples_before_it():
    asked = one_turn("q", "line 1", "question", "answer", system="Be brief.")
    shots = [one_turn(f"s{n}", "", f"question {n}", f"answer {n}", system="Be brief.") for n in range(2)]
    found = with_shots(asked, shots)
    assert [(message.role, message.content) for message in found.messages] == [
        ("system", "Be brief."),
        ("user", "question 0"),
        ("assistant", "answer 0"),
        ("user", "question 1"),
        ("assistant", "answer 1"),
        ("user", "question"),
        ("assistant", "answer"),
    ]
    assert found.answer == "answer" and isinstance(found.messages[0], Message)
    assert with_shots(asked, ()) == asked
