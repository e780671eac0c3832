"""Lengths of rows are those that training sees."""

from __future__ import annotations

from qlora_helpers.data import lengths as module
from qlora_helpers.data.examples import Example, Message, one_turn
from qlora_helpers.data.lengths import row_lengths
from qlora_helpers.data.templates import make_template

ALL = {"loss_on": "answer", "train_on": "all_turns", "seed": 0}


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_rows_prompts_and_answers_are_counted_apart(tokenizer):
    template = make_template("plain", tokenizer)
    rows = [one_turn(f"r{n}", f"row {n}", "lunch? " * n, "yes, at noon " * (4 - n) + "then") for n in (1, 2, 3)]
    found = row_lengths(rows, template, **ALL)
    prompts = [count(tokenizer, template.prompt(row).text) for row in rows]
    answers = [count(tokenizer, row.answer + tokenizer.eos_token) for row in rows]
    assert found.rows == found.measured == 3
    assert found.prompts == tuple(sorted(prompts)) and found.answers == tuple(sorted(answers))
    assert found.totals == tuple(sorted(map(sum, zip(prompts, answers, strict=True))))
    assert found.tokens == sum(found.totals)
    assert found.trained == sum(answers) and found.trained_share == sum(answers) / sum(found.totals)
    everything = row_lengths(rows, template, **ALL | {"loss_on": "all"})
    assert everything.totals == found.totals and everything.trained == found.tokens - 3


def test_a_conversation_s_last_answer_counts(tokenizer):
    turns = [Message("user", "hi"), Message("assistant", "a long answer about noon"), Message("user", "and?")]
    row = Example("c", "row 1", (*turns, Message("assistant", "no")))
    found = row_lengths([row], make_template("plain", tokenizer), **ALL)
    assert found.answers == (count(tokenizer, "no" + tokenizer.eos_token),)
    assert found.trained > found.answers[0]


def test_a_document_has_neither_prompt_nor_answer(tokenizer):
    found = row_lengths([Example("d", "row 1", text="rain all day")], make_template("plain", tokenizer), **ALL)
    assert found.totals == (count(tokenizer, "rain all day" + tokenizer.eos_token),)
    assert (found.prompts, found.answers) == ((), ())


def test_of_many_rows_a_sample_is_measured_and_the_rest_estimated(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MOST_MEASURED", 10)
    rows = [one_turn(f"r{n}", f"row {n}", "lunch?", "yes") for n in range(100)]
    found = row_lengths(rows, make_template("plain", tokenizer), **ALL)
    assert (found.rows, found.measured) == (100, 10)
    assert found.tokens == 100 * found.totals[0]
