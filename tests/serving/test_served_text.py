"""The text of an answer as its tokens come: nothing that was sent is taken back, and the whole is that of `answer_of`."""

from __future__ import annotations

import pytest

from qlora_helpers.data.templates import AnswerMarks
from qlora_helpers.evaluation.generate import answer_of
from qlora_helpers.serving.text import AnswerText

END, LEAD = 300, 301


class Bytes:
    """A tokenizer whose tokens are bytes; 300 ends an answer, 301 stands before one, and both have no text."""

    def decode(self, ids, skip_special_tokens=False) -> str:
        return bytes(each for each in ids if each < 256).decode(errors="replace")


def pieces(tokens, *, prompt=b"", lead=(), **more) -> list[str]:
    text = AnswerText(Bytes(), AnswerMarks((END,), lead), list(prompt), **more)
    found = []
    for token in tokens:
        found.append(text.add(token))
        if text.ended:
            break
    return [each for each in (*found, text.rest()) if each]


@pytest.mark.parametrize(
    "written",
    [
        "Ann brings a cake.",
        "  white space \n before,  between  and behind \n",
        "Grüße 🎂 ok",
        "a\x1b[31mred\x1b[0m b\x9b1m c\u202e",
        "<think>hm\nso</think>\n\nThe answer.",
        "< is no thought",
        "",
    ],
)
@pytest.mark.parametrize("ends", [True, False])
def test_the_pieces_are_the_whole_answer(written, ends):
    from qlora_helpers.base.text import plain

    tokens = [*written.encode(), *([END] if ends else [])]
    found = pieces(tokens)
    assert "".join(found) == plain(answer_of(tokens, Bytes(), AnswerMarks((END,))).text).strip()
    if written == "Ann brings a cake.":
        assert len(found) > 10


def test_a_thought_that_the_prompt_opened_is_not_sent():
    assert "".join(pieces([*b"so it is\n</think>\n\nYes.", END], prompt=b"<think>\n")) == "Yes."
    assert pieces([*b"never ends"], prompt=b"<think>\n") == ["never ends"]  # as `answer_of` gives it, at the end alone


def test_what_comes_before_the_lead_is_not_sent():
    assert "".join(pieces([*b"thoughts", LEAD, *b"Yes.", END], lead=(LEAD,))) == "Yes."


@pytest.mark.parametrize("stop", ["STOP", "ST"])
def test_a_stop_text_is_never_sent_nor_its_beginning(stop):
    found = pieces([*b"one S two STOP three"], stop=[stop])
    assert "".join(found) == "one S two"
    assert "".join(pieces([*b"one ST"], stop=["STOP"])) == "one ST"


def test_a_completion_is_what_goes_on_from_the_prompt():
    assert "".join(pieces([*b" <think>a</think> b \n", END], raw=True)) == " <think>a</think> b \n"
