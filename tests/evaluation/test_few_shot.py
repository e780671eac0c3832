"""The untuned model with examples in its prompt: as many as fit, the same for every row; where its answer ends."""

from __future__ import annotations

import pytest

from qlora_helpers.data.examples import one_turn
from qlora_helpers.evaluation.few_shot import few_shot_prompts, first_answer, no_examples

SHOTS = [one_turn(f"s{number}", "", "question", f"answer {number}") for number in range(3)]


def tokens_of(item, before):
    """Ten tokens an example, and the row's own length."""
    return [1] * 10 * len(before) + [2] * len(item.prompt)


def item(length):
    return one_turn(f"r{length}", "", "x" * length, "answer")


def test_as_many_examples_as_fit():
    found = few_shot_prompts([item(5), item(14), item(20), item(60)], SHOTS, tokens_of, 35)
    assert found.shown == [3, 2, 1, 0]
    assert [len(ids) for ids in found.ids] == [35, 34, 30, 60]
    assert "3 of 4 rows had room for fewer, 1 of them for none" in found.remark()
    everywhere = few_shot_prompts([item(5)], SHOTS[:2], tokens_of, 35)
    assert everywhere.remark() == "2 training examples stood in each prompt of the untuned model with examples"


def test_without_room_nothing_is_asked():
    assert few_shot_prompts([item(30)], SHOTS, tokens_of, 35) is None
    assert few_shot_prompts([item(3)], [], tokens_of, 35) is None
    assert "no row leaves room" in no_examples(SHOTS) and "hold none" in no_examples([])


@pytest.mark.parametrize(
    ("text", "answers", "first"),
    [
        ("billing\n\nClassify:\nmore", ["a", "b"], "billing"),
        ("billing\nand more", ["a", "b"], "billing"),
        ("\n billing ", ["a"], "billing"),
        ("one\ntwo\n\nthree", ["a\nb"], "one\ntwo"),
        ("one\n\ntwo Classify: three", ["a\n\nb"], "one\n\ntwo"),
        ("", ["a"], ""),
    ],
)
def test_an_answer_ends_where_the_next_example_begins(text, answers, first):
    shots = [one_turn("s", "", "question", answer) for answer in answers]
    assert first_answer(text, shots, "Classify:\n") == first
