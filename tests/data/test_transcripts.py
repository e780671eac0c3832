"""Conversations that were written out as one text are read as turns, in the ways that data are published in."""

from __future__ import annotations

import json

import pytest

from qlora_helpers.base.config import DataConfig
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.data.transcripts import STYLES, style_of, turns

ASKED = [
    ("user", "Is it open?\n\nToday."),
    ("assistant", "Yes: ### see [1]."),
    ("user", "Until when?"),
    ("assistant", "Nine."),
]
BRIEF = [("system", "Be brief."), *ASKED]
(Q, A), (Q2, A2) = ((ASKED[0][1], ASKED[1][1]), (ASKED[2][1], ASKED[3][1]))
WRITTEN = {  # style -> a text, and what it is
    "ChatML": (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{A}<|im_end|>\n"
        f"<|im_start|>user\n{Q2}<|im_end|>\n<|im_start|>assistant\n{A2}<|im_end|>\n",
        BRIEF,
    ),
    "Llama 3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        + "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in ASKED),
        BRIEF,
    ),
    "Gemma": (
        "<bos>"
        + "".join(
            f"<start_of_turn>{role.replace('assistant', 'model')}\n{text}<end_of_turn>\n" for role, text in ASKED
        ),
        ASKED,
    ),
    "Zephyr and Phi-3": ("".join(f"<|{role}|>\n{text}</s>\n" for role, text in BRIEF), BRIEF),
    "Llama 2 and Mistral": (
        f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{Q} [/INST] {A} </s><s>[INST] {Q2} [/INST] {A2} </s>",
        BRIEF,
    ),
    "### Human, ### Assistant": (f"### Human: {Q}### Assistant: {A}### Human: {Q2}### Assistant: {A2}", ASKED),
    "Alpaca's": (f"Be brief.\n\n### Instruction:\n{Q}\n\n### Response:\n{A}", BRIEF[:3]),
    "Human: and Assistant:": (f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman: {Q2}\n\nAssistant: {A2}", ASKED),
    "USER: and ASSISTANT:": (f"Be brief. USER: {Q} ASSISTANT: {A}</s>USER: {Q2} ASSISTANT: {A2}</s>", BRIEF),
}


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_each_style_is_recognised_and_read_whole(style):
    text, expected = WRITTEN[style.name]
    assert style_of([text]) is style
    assert [(turn["role"], turn["content"]) for turn in turns(text, style)] == expected


@pytest.mark.parametrize(
    "text",
    [
        "Nothing but prose.",
        "About [INST] marks and their use.",
        "### Human: a question without an answer",
        "<|im_start|>user\nq<|im_end|> a remark between <|im_start|>assistant\na<|im_end|>",
        "### Assistant: an answer first ### Human: then a question",
        "# Steps\n\n### Input:\nx\n\n### Output:\ny",
        "",
    ],
)
def test_what_is_not_made_of_turns_alone_is_no_transcript(text):
    assert style_of([text]) is None


@pytest.mark.parametrize("filler", [" ", "\n", "<s>", "[INST]", "### ", "<<SYS>>", "USER:", "<|im_start|>user\n"])
def test_the_work_grows_in_step_with_a_text(filler):
    """A pattern that looks at a run of blanks from each of its places would not end here."""
    assert style_of([f"[INST] {filler * 100_000} x"]) is None


def read(path, rows, **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_corpus(DataConfig(source=str(path), eval_rows=1, test_rows=1, **settings))


def test_a_file_of_them_is_read_as_messages_and_said(tmp_path):
    rows = [{"text": f"### Human: q{number}### Assistant: a{number}### Human: thanks"} for number in range(8)]
    corpus = read(tmp_path / "rows.jsonl", [*rows, {"text": "prose"}])
    assert corpus.form == "transcript"
    first = next(row for row in (*corpus.train, *corpus.eval, *corpus.test) if row.where.endswith(" 1"))
    assert [(message.role, message.content) for message in first.messages] == [("user", "q0"), ("assistant", "a0")]
    assert any(note.startswith("rows.jsonl: read as transcript (messages in 'text')") for note in corpus.notes)
    assert any("line 9: skipped, it is no conversation with marks" in note for note in corpus.notes)
    assert any("left out 8 turns" in note for note in corpus.notes)


def test_as_documents_where_asked_and_marks_in_prose_are_said(tmp_path):
    rows = [{"text": f"### Human: q{number}### Assistant: a"} for number in range(8)]
    as_text = read(tmp_path / "rows.jsonl", rows, format="text")
    assert as_text.form == "text" and as_text.train[0].text.startswith("### Human: q")
    prose = read(tmp_path / "prose.jsonl", [{"text": f"How [INST] is used, part {number}"} for number in range(8)])
    assert prose.form == "text"
    assert any("hold marks of conversations, such as '[INST]'" in note for note in prose.notes)
