"""The shape of a row: what is the prompt, what is the answer, and what older run folders hold becomes."""

from __future__ import annotations

import pytest

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_record
from qlora_helpers.data.duplicates import is_known, prompt_key, words_key
from qlora_helpers.data.examples import SUMMARIZE, Example, Message, one_turn
from qlora_helpers.data.sources import read_corpus


def test_a_row_of_one_turn_has_its_body_marked():
    row = one_turn(
        "a", "here", "Ann: hi", "Ann greets.", instruction="Sum up:\n", system="Be brief.", references=("R",)
    )
    assert [message.role for message in row.messages] == ["system", "user", "assistant"]
    assert row.messages[1].content == "Sum up:\nAnn: hi"
    assert (row.prompt, row.answer, row.references, row.is_document) == ("Ann: hi", "Ann greets.", ("R",), False)


def test_dialogues_become_messages_with_the_instruction_of_the_recipe():
    row = read_corpus(DataConfig()).train[0]
    assert [message.role for message in row.messages] == ["user", "assistant"]
    assert row.messages[0].content == "Summarize the chat dialogue:\n" + row.prompt
    own = read_corpus(DataConfig(instruction="In einem Satz:\n", system="Du bist knapp.")).train[0]
    assert (own.messages[0].content, own.messages[1].content) == ("Du bist knapp.", "In einem Satz:\n" + row.prompt)
    assert own.prompt == row.prompt


def test_a_row_of_an_older_run_is_read(tmp_path):
    old = {"id": "x", "dialogue": "Ann: hi", "summary": "Ann greets.", "where": "a line 1", "references": ["R"]}
    write_json(tmp_path / "row.json", old)
    expected = one_turn("x", "a line 1", "Ann: hi", "Ann greets.", instruction=SUMMARIZE, references=("R",))
    assert read_record(tmp_path / "row.json", Example) == expected
    write_json(tmp_path / "row.json", old | {"dialogue": 7})
    with pytest.raises(RunError, match="expected the texts dialogue and summary"):
        read_record(tmp_path / "row.json", Example)


def test_any_row_is_written_and_read_back(tmp_path):
    call = {"name": "f", "arguments": {"x": [1, None]}}
    turns = (Message("user", "a", body=(0, 1)), Message("assistant", "", "hm", (call,)), Message("tool", "3", name="f"))
    for row in (Example("a", "b", turns, tools=({"type": "function"},)), Example("a", "b", text="Prose.")):
        write_json(tmp_path / "row.json", row)
        assert read_record(tmp_path / "row.json", Example) == row


def test_rows_with_the_same_prompt_are_known_also_by_the_keys_of_older_runs():
    row = one_turn("a", "here", "Ann: Hi!", "Ann greets.", instruction=SUMMARIZE)
    other = one_turn("b", "there", "ann  hi", "Greeting.", instruction=SUMMARIZE)
    assert prompt_key(row) == prompt_key(other)
    assert is_known(other, {prompt_key(row)}) and is_known(other, {words_key("Ann: Hi!")})
    assert not is_known(one_turn("c", "there", "Bo: hi", "x"), {prompt_key(row), words_key("Ann: Hi!")})
    assert prompt_key(Example("d", "e", text="Prose.")) != prompt_key(Example("d", "e", text="Other prose."))
