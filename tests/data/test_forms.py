"""What a row is: each form that files have, read into the right messages; what can't be told apart is refused with the choices."""

from __future__ import annotations

import json
import random

import pytest

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data.sources import read_corpus

TURNS = [("user", "Is it open?"), ("assistant", "Yes."), ("user", "Until when?"), ("assistant", "Until nine.")]


@pytest.fixture
def read(tmp_path):
    def read(rows, name="rows.jsonl", **settings):
        path = tmp_path / name
        if isinstance(rows, list) and path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif isinstance(rows, bytes):
            path.write_bytes(rows)
        else:
            path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
        return read_corpus(DataConfig(source=str(path), eval_rows=1, test_rows=1, **settings))

    return read


def many(row, count=8):
    """Rows that differ: every `#` of a row becomes its number."""
    return [json.loads(json.dumps(row).replace("#", str(number))) for number in range(count)]


def example(corpus, number=0):
    """The row of this number in the file, whichever split it is in."""
    rows = [*corpus.train, *corpus.eval, *corpus.test]
    return next(row for row in rows if row.where.split()[-1] == str(number + 1))


def turns(row):
    return [(message.role, message.content) for message in row.messages]


ASK, TELL = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = [{"role": role, "content": f"{text} #"} for role, text in TURNS]
CHAT_READ = [(role, f"{text} 0") for role, text in TURNS]
SHARE = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": f"{text} #"} for role, text in TURNS]
FORMS = {  # a row, its form, and the messages
    "messages": ({"messages": CHAT}, "messages", CHAT_READ),
    "messages as a text": ({"messages": json.dumps(CHAT)}, "messages", CHAT_READ),
    "under another name": ({"chat": CHAT, "id": "#"}, "messages", CHAT_READ),
    "under any name": ({"thread": CHAT, "note": "x"}, "messages", CHAT_READ),
    "roles and contents as conversations": ({"conversations": CHAT}, "messages", CHAT_READ),
    "sharegpt": ({"conversations": SHARE}, "conversations", CHAT_READ),
    "sharegpt as a text": ({"conversations": json.dumps(SHARE)}, "conversations", CHAT_READ),
    "a list alone": (CHAT, "messages", CHAT_READ),
    "with its system": (
        {"conversations": SHARE, "system": "Be brief."},
        "conversations",
        [("system", "Be brief."), *CHAT_READ],
    ),
    "text parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a#"}, {"type": "text", "text": "b"}]},
                CHAT[1],
            ]
        },
        "messages",
        [("user", "a0b"), ("assistant", "Yes. 0")],
    ),
    "names of roles": (
        {
            "messages": [
                {"role": "Developer", "content": "s"},
                {"role": "Human", "content": "q#"},
                {"role": "model", "content": "a"},
            ]
        },
        "messages",
        [("system", "s"), ("user", "q0"), ("assistant", "a")],
    ),
    "alpaca": (
        {"instruction": "Sort.", "input": "b a #", "output": "a b"},
        "alpaca",
        [("user", "Sort.\n\nb a 0"), ("assistant", "a b")],
    ),
    "alpaca without input": (
        {"instruction": "Name #.", "input": "", "output": "Ann"},
        "alpaca",
        [("user", "Name 0."), ("assistant", "Ann")],
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann # came.", "response": "Ann", "category": "qa"},
        "alpaca",
        [("user", "Who?\n\nAnn 0 came."), ("assistant", "Ann")],
    ),
    "prompt and completion": (
        {"prompt": "2+#=", "completion": "x"},
        "prompt_completion",
        [("user", "2+0="), ("assistant", "x")],
    ),
    "prompt and completion as messages": (
        {"prompt": [{"role": "user", "content": "q#"}], "completion": [{"role": "assistant", "content": "a"}]},
        "prompt_completion",
        [("user", "q0"), ("assistant", "a")],
    ),
    "input and output": ({"input": "q#", "output": "a"}, "prompt_completion", [("user", "q0"), ("assistant", "a")]),
    "question and answer": (
        {"Question": "q#", "Answer": "a", "url": "x"},
        "question_answer",
        [("user", "q0"), ("assistant", "a")],
    ),
    "a question with a system's message": (
        {"id": "#", "system_prompt": "Be brief.", "question": "q#", "response": "a"},
        "question_answer",
        [("system", "Be brief."), ("user", "q0"), ("assistant", "a")],
    ),
    "alpaca with a rendered text": (
        {"instruction": "Sort #.", "input": "", "output": "a b", "text": "Below is ..."},
        "alpaca",
        [("user", "Sort 0."), ("assistant", "a b")],
    ),
    "a chat with its first question": ({"prompt": "q", "prompt_id": "x", "messages": CHAT}, "messages", CHAT_READ),
    "a document and its summary": ({"document": "d#", "summary": "s"}, "columns", [("user", "d0"), ("assistant", "s")]),
    "any two columns": (
        {"id": "#", "deutsch": "ja #", "english": "yes"},
        "columns",
        [("user", "ja 0"), ("assistant", "yes")],
    ),
    "a number for an answer": (
        {"question": "q#", "answer": 4},
        "question_answer",
        [("user", "q0"), ("assistant", "4")],
    ),
    "a text and its label": ({"text": "t#", "label": 1}, "columns", [("user", "t0"), ("assistant", "1")]),
    "an answer that depends on a text": (
        {"question": "q#", "context": "c", "answer": "a"},
        "question_answer",
        [("user", "q0\n\nc"), ("assistant", "a")],
    ),
    "squad": (
        {"context": "c#", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 3]}},
        "question_answer",
        [("user", "q\n\nc0"), ("assistant", "a")],
    ),
    "preferences": (
        {"prompt": "q#", "chosen": "a", "rejected": "b"},
        "prompt_completion",
        [("user", "q0"), ("assistant", "a")],
    ),
    "preferences as messages": ({"chosen": CHAT, "rejected": CHAT}, "messages", CHAT_READ),
    "preferences as messages with their question": (
        {"prompt": "q", "chosen": CHAT, "rejected": CHAT},
        "messages",
        CHAT_READ,
    ),
    "preferences after a chat": (
        {"prompt": [{"role": "user", "content": "q#"}], "chosen": [TELL], "rejected": [TELL | {"content": "b"}]},
        "prompt_completion",
        [("user", "q0"), ("assistant", "a")],
    ),
    "preferences as transcripts": (
        {"chosen": "\n\nHuman: q#\n\nAssistant: a", "rejected": "\n\nHuman: q#\n\nAssistant: b"},
        "transcript",
        [("user", "q0"), ("assistant", "a")],
    ),
    "a column of readers' comments": (
        {"question": "q#", "answer": "a", "comments": [{"author": "bob", "text": "x"}]},
        "question_answer",
        [("user", "q0"), ("assistant", "a")],
    ),
    "as Python writes it": ({"messages": str(CHAT)}, "messages", CHAT_READ),
    "a list for each key": (
        {"messages": {"role": [turn["role"] for turn in CHAT], "content": [turn["content"] for turn in CHAT]}},
        "messages",
        CHAT_READ,
    ),
    "contents in parts, as Gemini's": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
            "contents": [{"role": "user", "parts": [{"text": "q#"}]}, {"role": "model", "parts": [{"text": "a"}]}],
        },
        "messages",
        [("system", "Be brief."), ("user", "q0"), ("assistant", "a")],
    ),
    "an empty system's message": (
        {"messages": [{"role": "system", "content": ""}, *CHAT]},
        "messages",
        CHAT_READ,
    ),
    "objects for answers": (
        {"question": "q#", "answer": {"name": "Ann", "age": None}},
        "question_answer",
        [("user", "q0"), ("assistant", '{"name": "Ann", "age": null}')],
    ),
    "a boolean for an answer": (
        {"question": "q#", "answer": True},
        "question_answer",
        [("user", "q0"), ("assistant", "true")],
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_each_form_is_recognised_and_said(read, case):
    row, form, messages = FORMS[case]
    corpus = read(many(row))
    assert (corpus.form, turns(example(corpus))) == (form, messages)
    assert len(corpus.train) == 6
    said = next(note for note in corpus.notes if "read as" in note)
    assert said.startswith(f"rows.jsonl: read as {form} (") and "choose otherwise" in said


@pytest.mark.parametrize("case", [case for case in FORMS if isinstance(FORMS[case][0], dict)])
def test_a_form_that_is_named_is_the_same(read, case):
    row, form, messages = FORMS[case]
    corpus = read(many(row), format=form)
    assert turns(example(corpus)) == messages
    assert not any("read as" in note for note in corpus.notes)


def test_several_right_answers_are_one_answer_and_references(read):
    row = example(read(many({"question": "q#", "answers": ["Ann", "A.", "Ann"]})))
    assert (row.answer, row.references) == ("Ann", ("A.",))


def test_documents(read):
    corpus = read(many({"text": "A page. #", "url": "x", "date": "y"}))
    row = example(corpus)
    assert (corpus.form, row.text, row.messages, row.is_document) == ("text", "A page. 0", (), True)
    assert example(read(many("A line #"))).text == "A line 0"
    assert example(read(many({"body": "A page #", "n": "1", "m": "2"}), column="body")).text == "A page 0"


def test_weights_thinking_tool_calls_and_results(read):
    call = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": '{"zone": null, "n": 1}'}}
    tools = [{"type": "function", "function": {"name": "time", "parameters": {}}}]
    messages = [
        {"role": "user", "content": "Hm #?"},
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I look."},
        {"role": "tool", "tool_call_id": "c1", "name": "time", "content": {"now": 9}},
        {"role": "assistant", "content": "At nine.", "weight": 1},
    ]
    row = example(read(many({"messages": messages, "tools": json.dumps(tools)})))
    assert [message.learned for message in row.messages if message.role == "assistant"] == [False, True, True]
    called, result = row.messages[3], row.messages[4]
    assert called.tool_calls == ({"id": "c1", "name": "time", "arguments": {"zone": None, "n": 1}},)
    assert (called.content, called.thinking) == ("", "I look.")
    assert (result.tool_call_id, result.name, result.content) == ("c1", "time", '{"now": 9}')
    assert row.tools == tuple(tools)
    assert row.answer == "At nine."


def test_sharegpt_writes_a_call_as_a_turn(read):
    conversation = [
        {"from": "human", "value": "Time #?"},
        {"from": "function_call", "value": '{"name": "time", "arguments": {"zone": "UTC"}}'},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "Nine."},
    ]
    row = example(read(many({"conversations": conversation, "tools": "[]"})))
    assert [message.role for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1].tool_calls == ({"name": "time", "arguments": {"zone": "UTC"}},)


def test_turns_behind_the_last_answer_are_left_out_and_counted(read):
    corpus = read(many({"messages": [*CHAT, {"role": "user", "content": "Thanks"}]}))
    assert turns(example(corpus)) == CHAT_READ
    assert "rows.jsonl: left out 8 turns that stand behind a conversation's last answer" in corpus.notes


# templates


def test_any_columns_by_their_names_in_braces(read):
    row = {"subject": "Bill #", "body": "Too high.", "label": 3, "x": "not used"}
    settings = {"prompt": "Classify {{once}}.\n\n{subject}\n{body}\nEnd.", "answer": "<{label}>"}
    found = example(read(many(row), **settings))
    assert turns(found) == [("user", "Classify {once}.\n\nBill 0\nToo high.\nEnd."), ("assistant", "<3>")]
    assert found.prompt == "Bill 0\nToo high."  # from the first column to the last
    assert turns(example(read(many(row), **settings, instruction="Read.", system="Be brief."))) == [
        ("system", "Be brief."),
        ("user", "Read.\n\nClassify {once}.\n\nBill 0\nToo high.\nEnd."),
        ("assistant", "<3>"),
    ]


def test_empty_cells_of_a_prompt_are_counted_and_of_an_answer_named(read):
    rows = many({"subject": "Bill #", "body": "Too high.", "label": "a"})
    rows[1]["body"], rows[2]["label"], rows[3] = "nan", "", {"subject": "", "body": None, "label": "a"}
    corpus = read(rows, prompt="{subject}: {body}", answer="{label}")
    assert example(corpus, 1).prompt == "Bill 1: "
    assert "rows.jsonl: empty cells that data.prompt names, left out of their prompts: 1" in corpus.notes
    assert "rows.jsonl line 3: skipped, its answer ('label') is empty" in corpus.notes
    assert "rows.jsonl line 4: skipped, all that data.prompt names is empty" in corpus.notes


@pytest.mark.parametrize(
    ("prompt", "piece"),
    [
        ("{subject.__class__}", "no column 'subject.__class__'"),
        ("{subject[0]}", "no column 'subject[0]'"),
        ("{subject!r}", "no column 'subject!r'"),
        ("{0}", "no column '0'"),
        ("{}", "no column ''"),
        ("{subject", "brace that stands alone, at character 1"),
        ("a } {subject}", "brace that stands alone, at character 3"),
        ("no column", "names no column"),
    ],
)
def test_braces_hold_names_alone(read, prompt, piece):
    with pytest.raises(DataError) as caught:
        read(many({"subject": "s#", "label": "a"}), prompt=prompt, answer="{label}")
    assert piece in str(caught.value) and "data.prompt" in str(caught.value)


def test_prompt_and_answer_belong_together(read):
    for settings in ({"prompt": "{a}"}, {"answer": "{a}"}, {"prompt": "{a}", "answer": "{b}", "format": "alpaca"}):
        with pytest.raises(DataError, match="belong together"):
            read(many({"a": "#", "b": "x"}), **settings)


# what can't be told apart

UNCLEAR = {
    "a chat and its text": (
        {"messages": CHAT, "prompt": "a", "completion": "b"},
        "several ways",
        "data.format=messages",
    ),
    "two forms mixed": ({"messages": CHAT, "dialogue": "d#", "summary": "s"}, "several ways", "data.format=dialogue"),
    "two chats": ({"first": CHAT, "second": CHAT}, "several ways", "data.column=first", "data.column=second"),
    "a text with a word": ({"text": "t#", "kind": 1}, "several ways", "data.format=text", "data.format=columns"),
    "many columns": (
        {"a": "#", "b": "x", "c": "y"},
        *("no known form", "'a', 'b', 'c'", r"--set data.prompt='{a}\n\n{b}' --set data.answer='{c}'"),
    ),
    "many columns, one of them an answer": (
        {"title": "#", "reply": "x", "body": "y"},
        *("no known form", r"--set data.prompt='{title}\n\n{body}' --set data.answer='{reply}'"),
    ),
    "preferences without their questions": ({"chosen": "a#", "rejected": "b"}, "no known form", "data.column="),
    "answers marked as bad": (
        {"prompt": "q#", "completion": "a", "label": False},
        *("the column 'label' of rows.jsonl says which answers are good ones", "--set data.format=prompt_completion"),
    ),
    "chats marked as bad": ({"messages": [ASK, TELL], "kto_tag": "False"}, "'kto_tag'", "--set data.format=messages"),
    "a turn a row": (
        {"message_id": "#", "text": "t", "role": "prompter"},
        *("is one turn of a conversation, by its column 'role'", "--set data.format=text"),
    ),
    "turns as numpy prints them": (
        {"messages": "[{'role': 'user', 'content': '#'}\n {'role': 'assistant', 'content': 'a'}]"},
        *("'messages'", "can't be parsed", "--set data.format=text"),
    ),
    "lists of nobody knows whom": ({"dialog": ["a#", "b"]}, "lists without roles", "--set data.column=dialog"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_unclear_is_refused_with_the_settings_to_choose_from(read, case):
    row, *pieces = UNCLEAR[case]
    with pytest.raises(DataError) as caught:
        read(many(row))
    for piece in ("rows.jsonl", *pieces):
        assert piece in str(caught.value)


def test_a_choice_ends_the_doubt(read):
    row = {"text": "t#", "kind": 1}
    assert read(many(row), format="text").form == "text"
    assert turns(example(read(many(row), format="columns"))) == [("user", "t0"), ("assistant", "1")]
    assert turns(example(read(many({"first": CHAT, "second": CHAT}), column="first"))) == CHAT_READ
    assert example(read(many({"dialog": ["a#", "b"]}), column="dialog")).text == "a0\nb"
    with pytest.raises(DataError, match="not of the form alpaca"):
        read(many(row), format="alpaca")


def test_answers_beside_the_first_are_references_also_in_squads_way(read):
    rows = many({"context": "c", "question": "q#", "answers": {"text": ["a", "b"], "answer_start": [0, 3]}})
    rows[1]["answers"] = {"text": [], "answer_start": []}  # a question without an answer
    corpus = read(rows)
    assert (example(corpus).answer, example(corpus).references) == ("a", ("b",))
    assert any("line 2: skipped, its answer is empty" in note for note in corpus.notes)


# rows that can't be used

BROKEN = {
    "user after user": ([ASK, ASK, TELL], "its roles are out of order: message 2 is user after user"),
    "an answer first": ([TELL, ASK, TELL], "its roles are out of order: message 1 is assistant at the start"),
    "a late system": (
        [ASK, TELL, {"role": "system", "content": "s"}],
        "its roles are out of order: message 3 is system",
    ),
    "a result of no call": ([ASK, TELL, {"role": "tool", "content": "9"}, TELL], "message 3 answers no tool call"),
    "no answer": ([ASK], "it has no answer"),
    "an empty answer": ([ASK, {"role": "assistant", "content": "\u200b"}], "one of its answers is empty"),
    "an empty question": ([{"role": "user", "content": " "}, TELL], "one of its messages is empty"),
    "an unknown role": (
        [{"role": "narrator", "content": "x"}, TELL],
        "it has an unknown role: 'narrator' in message 1",
    ),
    "a role that is no text": ([{"role": 3, "content": "x"}, TELL], "it has an unknown role"),
    "an infinite number": ([ASK, {"role": "assistant", "content": float("inf")}], "is an infinite number"),
    "half a weight": ([ASK, TELL | {"weight": 0.5}], "it has a weight other than 0 and 1"),
    "half a loss": ([ASK, TELL | {"loss": 0.5}], "it has a loss other than 0 and 1"),
    "a word for a mark": ([ASK, TELL | {"train": "false"}], "it has a train other than 0 and 1"),
    "parts of an answer": (
        [ASK, TELL | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}],
        "it marks parts of an answer to be learned (train_detail)",
    ),
    "parts with speakers": ([ASK | {"content": [{"speaker": "Ann", "text": "x"}]}, TELL], "is not text but list"),
    "a thought among the parts": (
        [ASK, {"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": "a"}]}],
        "is not text but list",
    ),
    "a key twice in a call's arguments": (
        [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}]}],
        "an object in it has a key twice: 'x'",
    ),
    "a key twice in a list that is text": (
        '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]',
        "an object in it has a key twice: 'content'",
    ),
    "a key twice as Python writes it": (
        "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a', 'content': 'b'}]",
        "an object in it has a key twice: 'content'",
    ),
    "nothing learned": ([ASK, TELL | {"weight": 0}], "all its answers have weight 0"),
    "a picture": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, TELL],
        "part of type 'image_url'",
    ),
    "a call without a name": (
        [ASK, {"role": "assistant", "tool_calls": [{"function": {}}]}],
        "a tool call has no name",
    ),
    "no list": ("hello", "its messages are not a list but str"),
    "no objects": (["hello"], "its messages are not objects"),
    "missing": (None, "its messages are missing"),
    "half a character": ([ASK, {"role": "assistant", "content": "\ud83d"}], "holds half a character"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_conversation_is_named_with_its_line_and_left_out(read, case):
    messages, reason = BROKEN[case]
    corpus = read([*many({"messages": CHAT}), {"messages": messages}])
    assert any(note.startswith("rows.jsonl line 9: skipped, ") and reason in note for note in corpus.notes), (
        corpus.notes
    )
    assert len(corpus.train) == 6
    with pytest.raises(DataError, match=r"rows.jsonl has 1 row that can't be used.*data.bad_rows=skip") as caught:
        read([*many({"messages": CHAT}), {"messages": messages}], bad_rows="refuse")
    assert "rows.jsonl line 9" in str(caught.value)


def test_what_was_decided_about_roles_systems_and_objects_is_said(read):
    said = [{"speaker": "customer", "text": "q#"}, {"speaker": "Agent", "text": "a"}]
    assert read(many({"turns": said})).notes[1] == (
        "rows.jsonl: who speaks was taken by its name: 'agent' as assistant, 'customer' as user"
    )
    empty = [{"role": "system", "content": ""}, *CHAT]
    assert "rows.jsonl: left out 8 system messages that are empty" in read(many({"messages": empty})).notes
    objects = many({"question": "q#", "answer": {"a": 1}})
    assert "rows.jsonl: answers that are objects, written as JSON: 8" in read(objects).notes
    objects[0]["answer"] = "a text"  # so the objects after it are another thing
    with pytest.raises(DataError, match="its answer is not text but an object with 'a'"):
        read(objects)


@pytest.mark.parametrize(("mark", "value"), [("train", False), ("loss", False), ("train", 0), ("loss", 0.0)])
def test_answers_that_other_trainers_leave_out_are_not_learned(read, mark, value):
    shared = [*SHARE[:1], SHARE[1] | {mark: value, "weight": None}, *SHARE[2:]]
    learned = [message.learned for message in example(read(many({"conversations": shared}))).messages]
    assert learned == [True, False, True, True]


def test_a_call_that_is_not_to_be_learned_is_not(read):
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "loss": False}
    asked, result = {"from": "human", "value": "q#"}, {"from": "observation", "value": "r"}
    row = example(read(many({"conversations": [asked, call, result, {"from": "gpt", "value": "a"}]})))
    assert [message.learned for message in row.messages] == [True, False, True, True]


@pytest.mark.parametrize("answered", ["completion", "chosen"])
def test_answers_within_a_prompt_are_read_and_not_learned(read, answered):
    """Of a prompt and its completion, the completion alone is to be learned, as in every trainer."""
    corpus = read(many({"prompt": [ASK, TELL, ASK | {"content": "r#"}], answered: [TELL | {"content": "b"}]}))
    row = example(corpus)
    assert turns(row) == [("user", "q"), ("assistant", "a"), ("user", "r0"), ("assistant", "b")]
    assert [message.learned for message in row.messages] == [True, False, True, True]
    assert "rows.jsonl: answers in prompts, which are read and not learned: 8" in corpus.notes


def test_objects_among_a_chats_answers_are_counted(read):
    corpus = read(many({"messages": [ASK | {"content": "q#"}, TELL | {"content": {"a": "#"}}]}))
    assert turns(example(corpus))[1] == ("assistant", '{"a": "0"}')
    assert "rows.jsonl: answers that are objects, written as JSON: 8" in corpus.notes


def test_a_tool_without_the_object_around_it_gets_it(read):
    tool = {"name": "find", "parameters": {"type": "object", "properties": {}}}
    (found,) = example(read(many({"messages": CHAT, "tools": [tool]}))).tools
    assert found == {"type": "function", "function": tool}


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("rows.jsonl", '{"prompt": "q", "completion": "a", "completion": "b"}\n', "rows.jsonl line 1"),
        ("rows.json", '[{"prompt": "q", "completion": "a", "completion": "b"}]', "rows.json"),
        ("rows.json", '{"data": [{"prompt": "q", "completion": "a", "completion": "b"}]}', "rows.json"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(read, name, text, place):
    """Readers take the last one, and nobody hears of the first."""
    with pytest.raises(DataError) as caught:
        read(text, name)
    assert f"{place} has an object with the key 'completion' twice" in str(caught.value)


def test_many_broken_rows_are_counted_by_kind(read):
    rows = many({"question": "q#", "answer": "a"}, 40)
    for number, value in enumerate(["", "nan", None, [], {"x": 1}] * 6):
        rows[number]["answer"] = value
    notes = read(rows).notes
    assert sum(": skipped, " in note for note in notes) == 20
    assert notes[-1].startswith("and 10 more rows skipped: ")
    assert {part.split(" x ")[0].split()[-1] for part in notes[-1].split("; ")} == {"2", "4"}


def test_words_that_may_mean_a_missing_value_are_taken_and_said(read):
    rows = many({"question": "q#", "answer": "yes"})
    rows[0]["answer"] = rows[1]["answer"] = "None"
    corpus = read(rows)
    assert example(corpus).answer == "None"
    assert any("may stand for missing values: 2 x 'None'" in note for note in corpus.notes)


def test_a_bad_row_in_another_shape_ends_nothing(read):
    """Any JSON value may stand where a row, a message or a text is expected."""
    values = [
        None,
        True,
        1.5,
        "x",
        "[{",
        [],
        {},
        [[]],
        {"role": None},
        [{"role": []}],
        {"text": 1},
        [None],
        '[{"role": "user"}]',
    ]
    rows = many({"messages": CHAT, "tools": []}, 8)
    random.seed(0)
    for value in values:
        rows += [{"messages": value}, {"messages": [value]}, {"messages": [ASK, value]}, value]
        rows += [{"messages": [ASK | {"content": value}, TELL]}, {"messages": [ASK, TELL | {"tool_calls": value}]}]
        rows += [{"messages": CHAT[:2], "tools": value}]
    corpus = read(rows)
    assert corpus.form == "messages" and len(corpus.train) >= 6
