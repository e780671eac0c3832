"""Rows that are too long: prompts are cut at the side that the settings name, answers never, and all that is lost is said."""

from __future__ import annotations

import pytest
from chat_families import family_tokenizer

from qlora_helpers.base.errors import DataError
from qlora_helpers.data.examples import Example, Message, one_turn
from qlora_helpers.data.labels import IGNORED, LabelSettings, label_rows
from qlora_helpers.data.long_rows import MIDDLE, shortened, side_of
from qlora_helpers.data.outcome import Outcome, outcome_notes, shown_cut
from qlora_helpers.data.templates import make_template

TOKENIZER = family_tokenizer("chatml")
CHAT = make_template("chat", TOKENIZER)
WORDS = " ".join(f"word{number}" for number in range(60))
TICKET = one_turn("t", "rows.csv line 7", WORDS, "Tomorrow.", instruction="Answer:\n")


def conversation(turns: int) -> Example:
    messages = [Message("system", "You are brief.")]
    for number in range(turns):
        messages += [Message("user", f"question {number}"), Message("assistant", f"answer {number}")]
    return Example("c", "rows.csv line 8", tuple(messages))


def labelled(example, long_rows="auto", most=120):
    outcome = Outcome()
    rows = list(label_rows([example], CHAT, LabelSettings(long_rows=long_rows, max_tokens=most), outcome))
    return rows, outcome


def text_of(row) -> str:
    return TOKENIZER.decode(row.ids)


@pytest.mark.parametrize("long_rows", ["trim_start", "trim_middle", "trim_end", "auto"])
def test_one_text_is_cut_at_the_side_that_was_asked_for(long_rows):
    (row,), outcome = labelled(TICKET, long_rows)
    text = text_of(row)
    assert 110 < len(row) <= 120
    assert "user\nAnswer:\n" in text and text.endswith("assistant\nTomorrow.<|im_end|>")
    assert ("word0 " in text) is (long_rows != "trim_start")
    assert ("word59<|im_end|>" in text) is (long_rows != "trim_end")
    assert (MIDDLE in text) is (long_rows in ("trim_middle", "auto"))
    ((start, end),) = row.trained
    assert TOKENIZER.decode(row.ids[start:end]) == "Tomorrow.<|im_end|>"
    assert outcome.trimmed == ["t"] and row.trimmed_tokens > 100
    side = {"trim_start": "the first", "trim_end": "the last"}.get(long_rows, "")
    assert outcome_notes(outcome)[0].startswith(f"rows.csv line 7: {side}".rstrip())
    shown = shown_cut(outcome.cuts)
    assert f"[{row.trimmed_tokens} tokens cut]" in shown and shown.startswith("rows.csv line 7: ")


def test_a_chat_keeps_its_newest_turns_and_its_system_s_text():
    (row,), outcome = labelled(conversation(12))
    text = text_of(row)
    assert text.startswith("<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\nquestion ")
    assert "question 0" not in text and "question 11" in text and text.endswith("answer 11<|im_end|>")
    kept = text.count("question ")
    assert [TOKENIZER.decode(row.ids[start:end]) for start, end in row.trained] == [
        f"answer {number}<|im_end|>" for number in range(12 - kept, 12)
    ]
    assert 100 < len(row) <= 120
    assert "oldest exchange" in outcome.cuts[0][3]


def test_the_last_question_of_a_chat_is_cut_when_nothing_older_is_left():
    messages = (*conversation(2).messages[:3], Message("user", WORDS), Message("assistant", "Tomorrow."))
    (row,), _ = labelled(Example("c", "row", messages))
    text = text_of(row)
    assert "question 0" not in text and "word59<|im_end|>" in text and "word0 " not in text


def test_a_document_is_split_and_every_token_is_there_once():
    document = Example("d", "rows.txt", text=WORDS)
    rows, outcome = labelled(document)
    whole = TOKENIZER(WORDS)["input_ids"] + [TOKENIZER.eos_token_id]
    assert [token for row in rows for token in row.input_ids] == whole
    assert [row.id for row in rows] == [f"d part {number}" for number in range(1, len(rows) + 1)]
    assert all(row.labels == [IGNORED, *row.input_ids[1:]] and len(row) <= 120 for row in rows)
    assert outcome_notes(outcome) == ["1 documents are longer than a sequence and were split"]
    assert labelled(document, "split")[0][0].input_ids == rows[0].input_ids


@pytest.mark.parametrize("long_rows", ["trim_start", "trim_end"])
def test_a_document_is_cut_where_that_is_asked_for(long_rows):
    (row,), outcome = labelled(Example("d", "rows.txt", text=WORDS), long_rows)
    assert len(row) == 120
    assert text_of(row).startswith("word0") is (long_rows == "trim_end")
    assert text_of(row).endswith("word59<|im_end|>") is (long_rows == "trim_start")
    assert outcome.unended == (["d"] if long_rows == "trim_end" else [])


def test_long_rows_are_dropped_or_refused():
    rows, outcome = labelled(TICKET, "drop")
    assert rows == [] and outcome.skipped[0][2] == "longer than a sequence"
    with pytest.raises(
        DataError, match=r"rows\.csv line 7: the row is longer than a sequence; expected at most 120 tokens"
    ):
        labelled(TICKET, "refuse")


def test_an_answer_is_never_cut():
    rows, outcome = labelled(one_turn("a", "row 9", "Where?", WORDS))
    assert rows == [] and outcome.skipped[0][2] == "its answer alone fills the sequence"


def test_defaults_by_what_a_row_is():
    assert side_of("auto", TICKET) == "middle"
    assert side_of("auto", conversation(3)) == "start"
    assert side_of("trim", TICKET) == "end"  # the setting's name in earlier versions


def test_nothing_is_left_to_cut():
    bare = one_turn("b", "row", "", "Tomorrow.", instruction="A long instruction.")
    assert shortened(bare, 25, 20, "middle", CHAT.encoder) is None
