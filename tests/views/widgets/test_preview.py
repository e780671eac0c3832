"""The look at a row while settings are chosen: its turns, and its tokens by a process without torch."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from chat_families import family_tokenizer

from qlora_helpers.base.config import DataConfig, ModelConfig
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.data.first_rows import first_rows
from qlora_helpers.data.labels import label_row
from qlora_helpers.data.templates import make_template
from qlora_helpers.views.widgets import ConfigForm
from qlora_helpers.views.widgets.preview import RowPreview
from qlora_helpers.views.widgets.token_writer import TokenWriter, request

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 1, "b": 2})}}


def chat(number: int) -> dict:
    """A conversation of two exchanges with a tool call, as OpenAI writes it."""
    return {
        "messages": [
            {"role": "user", "content": f"What is {number} plus 2? <b>"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "Any time."},
        ]
    }


@pytest.fixture
def chats(tmp_path):
    """A file with conversations, one of which can't be used."""
    path = tmp_path / "chats.jsonl"
    rows = [chat(number) for number in range(5)]
    rows[1]["messages"] = rows[1]["messages"][:1]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tokenizer of a family whose chat template writes tools."""
    folder = tmp_path_factory.mktemp("chatml")
    family_tokenizer("chatml").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writer():
    writer = TokenWriter()
    yield writer
    writer.close()


def marks(page: str) -> list[str]:
    """Each turn of a page with what is said of its training."""
    return re.findall(r'<div class="who"><b>([^<]*)</b>(?:<span class="qlora-mark [^"]*">([^<]*)</span>)?', page)


def test_the_first_rows_are_those_that_training_gets(chats):
    found = first_rows(DataConfig(source=str(chats)))
    assert [row.where for row in found.rows] == [f"chats.jsonl line {line}" for line in (1, 3, 4, 5)]
    assert found.form == "messages (messages in 'messages')" and found.columns == ("messages",)
    assert any("chats.jsonl line 2: skipped" in note for note in found.notes)
    assert len(first_rows(DataConfig(source=str(chats)), most=3).rows) == 2, "usable or not, three rows are read"


def test_rows_behind_the_first_ones_are_not_read(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text((json.dumps({"prompt": "p", "completion": "c"}) + "\n") * 1100 + "broken")
    assert len(first_rows(DataConfig(source=str(path))).rows) == 20


def test_a_large_file_that_can_only_be_read_whole_is_not_read(tmp_path, monkeypatch):
    from qlora_helpers.data import first_rows as module

    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "p", "completion": "c"}] * 30))
    assert len(first_rows(DataConfig(source=str(path))).rows) == 20
    monkeypatch.setattr(module, "MOST_WHOLE_BYTES", 100)
    assert "can only be read whole" in first_rows(DataConfig(source=str(path))).unread
    assert "isn't on this disk" in first_rows(DataConfig(source="someone/somewhere")).unread


@pytest.mark.parametrize(
    ("family", "trained", "why"),
    [
        ("chatml", [1, 3, 5], ""),
        ("qwen3", [5], "writes it otherwise once another turn follows"),
        ("phi", [3, 5], "does not write its tool calls"),
        ("gemma", [], "refuses it"),
    ],
)
def test_the_process_writes_the_very_tokens_that_are_trained(writer, tmp_path, chats, family, trained, why):
    tokenizer, data = family_tokenizer(family), DataConfig(source=str(chats), template="chat")
    tokenizer.save_pretrained(tmp_path / "model")
    for example in first_rows(data).rows[:2]:
        found = writer.ask(request(ModelConfig(name=str(tmp_path / "model")), data, example))
        row = label_row(example, make_template("chat", tokenizer))
        assert found["trained"] == trained and found["template"] == "chat"
        reasons = dict(found["masked"])
        assert sorted([*reasons, *trained]) == ([1, 3, 5] if row else [])
        assert all(why in reason for reason in reasons.values()) and (found["left_out"] != "") == (row is None)
        assert row is not None or why in found["left_out"]
        if row is not None:
            assert "".join(found["texts"]) == tokenizer.decode(row.input_ids) and found["tokens"] == len(row)
            learned = [kind in ("trained", "end") for kind in found["kinds"]]
            assert learned == [label != -100 for label in row.labels] and found["trained_tokens"] == sum(learned)


def test_the_process_needs_no_torch():
    code = (
        "import sys; from qlora_helpers.model.preview_process import hide_torch; hide_torch()\n"
        "from qlora_helpers.model.tokenizers import tokenizer_of\nfrom transformers import AutoTokenizer\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_tokenizer_that_is_not_on_the_disk_is_one_sentence(chats, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))  # another test may have made a random model in its own
    example, writer = first_rows(DataConfig(source=str(chats))).rows[0], TokenWriter()
    for name in ("someone/model", "/nowhere/model", "random:falcon-40b", "/nowhere/model.gguf"):
        found = writer.ask(request(ModelConfig(name=name), DataConfig(), example))
        assert "is not on this disk yet" in found["error"], name
    writer.close()


def test_a_process_that_ended_is_told_and_started_again(writer, folder, chats):
    data = DataConfig(source=str(chats))
    line = request(ModelConfig(name=str(folder)), data, first_rows(data).rows[0])
    assert writer.ask(line)["tokens"]
    os.kill(writer._process.pid, signal.SIGSTOP)  # it answers nothing, however fast the machine is
    assert "took too long" in writer.ask(line, timeout_s=0)["error"]
    assert writer.ask(line)["tokens"]
    os.kill(writer._process.pid, signal.SIGKILL)
    writer._process.wait()
    assert writer.ask(line)["tokens"]


@pytest.fixture
def shown(folder, chats, writer):
    """The preview of the conversations, by the tokenizer of the folder."""
    preview = RowPreview()
    preview._writer = writer
    config = profile_config("tiny").with_settings({"model.name": str(folder), "data.source": str(chats)})
    preview.show(config)
    assert not preview.first.rows, "nothing is read before somebody looks"
    preview.finish()
    return preview, config


def test_a_row_is_shown_as_turns_and_as_tokens(shown):
    preview, config = shown
    assert "Read as <b>messages" in preview._what.value and "line 2: skipped" in preview._what.value
    assert "row 1 of the first 4: chats.jsonl line 1" in preview._place.value
    turns = preview._turns.value
    assert marks(turns) == [
        *(("user", ""), ("assistant", "trained"), ("tool&#x27;s result", ""), ("assistant", "trained")),
        *(("user", ""), ("assistant", "trained")),
    ]
    assert "calls <code>add</code>" in turns and "&lt;b&gt;" in turns and "<b>?" not in turns
    assert 'class="k-trained"' in preview._tokens.value and "template: chat" in preview._tokens.value
    preview.go(-1)
    preview.finish()
    assert "chats.jsonl line 5" in preview._place.value and preview.found["tokens"]


def test_in_a_kernel_the_tokens_come_while_other_cells_run(folder, chats, writer):
    async def notebook() -> RowPreview:
        preview = RowPreview()
        preview._writer = writer
        preview.show(profile_config("tiny").with_settings({"model.name": str(folder), "data.source": str(chats)}))
        preview.activate()
        assert "on their way" in preview._tokens.value
        preview.go(1)  # before the first row's tokens are there
        await asyncio.gather(*preview._tasks)
        return preview

    preview = asyncio.run(notebook())
    assert preview.found["tokens"] and "chats.jsonl line 3" in preview._place.value
    assert "What is 2" in "".join(preview.found["texts"]), "the tokens are those of the row that is shown"


def test_it_follows_the_settings(shown, tmp_path):
    preview, config = shown
    preview.show(config.with_settings(["data.train_on=last_turn"]))
    preview.finish()
    assert [mark for who, mark in marks(preview._turns.value) if who == "assistant"] == ["not trained"] * 2 + [
        "trained"
    ]
    assert "data.train_on" in preview._turns.value
    preview.show(config.with_settings(["data.seq_len_tokens=32", "data.long_rows=drop", "evaluation.max_new_tokens=8"]))
    preview.finish()
    assert "left out: longer than a sequence by" in preview._turns.value and "not trained" in preview._turns.value
    preview.show(config.with_settings({"data.source": str(tmp_path / "gone.jsonl")}))
    assert "There is no row to show" in preview._what.value and "gone.jsonl" in preview._what.value
    assert preview._turns.value == preview._tokens.value == ""


def test_a_form_shows_a_row_beside_the_settings_of_the_data(run, chats, falcon):
    run.save_config(profile_config("tiny").with_settings({"data.source": str(chats)}))
    form = ConfigForm(run)
    assert form.preview.first.rows == (), "the first page is another one"
    form.pages.box.selected_index = 1
    assert form.beside.box.selected_index == 1 and len(form.preview.first.rows) == 4
    form.preview.finish()
    assert form.preview.found["template"] == "plain" and form.preview.found["trained"] == [1, 3, 5]
    form.fields["data.system"].control.value = "Be brief."
    form.preview.finish()
    assert marks(form.preview._turns.value)[0] == ("system", "") and "Be brief." in form.preview._turns.value
    form.pages.box.selected_index = 0
    assert form.beside.box.selected_index == 0
    form.preview.close()
