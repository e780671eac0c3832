"""The browser of prepared rows, without a browser."""

from __future__ import annotations

import json
import re

import pytest
from tiny import prepared_data

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.base.style import inline
from qlora_helpers.data.examples import one_turn
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.data.outcome import left_out
from qlora_helpers.data.rows import SkippedRows
from qlora_helpers.data.sources import Corpus, read_corpus
from qlora_helpers.views.tokens import token_texts
from qlora_helpers.views.widgets import row_browser, row_turns


@pytest.fixture(scope="module")
def packed(dialogues, tokenizer):
    """Six training rows in blocks of 256 tokens, several in one."""
    corpus = Corpus("written for the tests", "CC0-1.0", dialogues[:6], dialogues[6:7], dialogues[7:], notes=())
    return prepared_data(corpus, tokenizer, seq_len_tokens=256)


@pytest.fixture
def rows(packed, tokenizer):
    return row_browser(packed, tokenizer)


def find(widget, name):
    if name in getattr(widget, "_dom_classes", ()):
        return widget
    return next((hit for child in getattr(widget, "children", ()) if (hit := find(child, name))), None)


def shown(rows) -> str:
    return find(rows.box, "qlora-row-tokens").value


def of_kind(page: str, kind: str) -> str:
    """What the tokens of a kind say together, in a page's text without its key."""
    body = page.split('<div class="qlora-kinds">')[0]
    return "".join(re.findall(rf'<s class="k-{kind}[^"]*"[^>]*>(.*?)</s>', body, re.DOTALL))


def test_colours_agree_with_the_labels(rows, packed, tokenizer, dialogues):
    summaries = {item.id: item.answer for item in dialogues}
    seen = set()
    for _ in range(6):
        row_id = re.search(r": (d\d) \(", rows._head.value)[1]
        seen.add(row_id)
        page = shown(rows)
        assert of_kind(page, "trained").replace("&#x27;", "'") == summaries[row_id]
        assert of_kind(page, "end") == "END"
        assert "Summarize the chat dialogue" in of_kind(page, "masked")
        find(rows.box, "qlora-next").click()
    assert len(seen) == 6 and rows.index == 0, "past the last it begins again"


def test_a_whole_sequence_shows_where_rows_begin_and_what_is_padding(rows, packed):
    block = max(range(len(packed.train)), key=lambda index: len(packed.train[index]["row_ids"]))
    ids = packed.train[block]["row_ids"]
    assert len(ids) > 1
    rows.search("")
    rows.show(next(index for index, place in enumerate(rows._rows) if place[0] == block))
    assert shown(rows).count('class="qlora-bound') == 0
    find(rows.box, "qlora-whole-sequence").value = True
    page = shown(rows)
    padding = 256 - len(packed.train[block]["input_ids"])
    assert page.count('class="qlora-bound') == len(ids) + 1 and all(row in page for row in ids)
    assert f'<span class="k-padding">{padding} tokens</span>' in page
    assert page.count('class="qlora-bound here"') == 1
    trained = sum(label != IGNORED for label in packed.train[block]["labels"])
    assert f"({trained - len(ids)} tokens" in page and f"({len(ids)} tokens" in page


def test_search_goes_through_the_rows_with_the_text(rows):
    box = find(rows.box, "qlora-search")
    box.value = "KEYS"
    everywhere = [index for index, row in enumerate(rows._row_texts()) if "summarize" in row.lower()]
    assert len(rows.matches) == 0 and "No row" in rows._found.value  # row d8 is for the test
    box.value = "CAN"
    assert rows.matches and rows.index in rows.matches
    assert "k-found" in shown(rows) and "can" in "".join(re.findall(r'k-found"[^>]*>([^<]*)<', shown(rows))).lower()
    if len(rows.matches) > 1:
        before = rows.index
        find(rows.box, "qlora-next").click()
        assert rows.index in rows.matches and rows.index != before
    box.value = "summarize"
    assert list(rows.matches) == everywhere and len(everywhere) == 6
    rows.show(0)
    find(rows.box, "qlora-previous").click()
    assert rows.index == 5, "before the first match comes the last"
    box.value = ""
    assert rows.matches == () and "k-found" not in shown(rows)


def test_a_row_number_jumps_and_an_invalid_one_is_one_message(rows):
    number = find(rows.box, "qlora-row-number")
    number.value = "5"
    assert rows.index == 4
    number.value = "99"
    assert "numbered 1 to 6" in rows._found.value and rows.index == 4
    for typed in ("4.5", "four", "", "-1", "9" * 30):
        number.value = typed
        assert "numbered 1 to 6" in rows._found.value and rows.index == 4
    find(rows.box, "qlora-previous").click()
    assert (rows.index, number.value) == (3, "4")


def test_the_evaluation_rows_too(rows, packed, tokenizer):
    rows._split.value = "eval"
    assert "d7" in rows._head.value and "row 1 of 1" in rows._head.value
    assert "d7" in repr(row_browser(packed, tokenizer, split="eval"))
    with pytest.raises(DataError, match="train or eval"):
        row_browser(packed, tokenizer, split="test")


def test_html_in_a_dialogue_is_shown_not_run(tokenizer):
    bad = "<img src=x onerror=alert(1)>"
    rows = tuple(one_turn(f"<b>{n}</b>", "here", f"A: {bad} {n}\nB: ok", f"{bad} {n}") for n in range(3))
    corpus = Corpus("x", "CC0-1.0", rows[:1], rows[1:2], rows[2:], notes=())
    browser = row_browser(prepared_data(corpus, tokenizer, packing=False), tokenizer)
    browser.search(bad)
    find(browser.box, "qlora-whole-sequence").value = True
    everything = browser._found.value + browser._head.value + shown(browser) + browser.still_html()
    ours = re.sub(r"</?(s|b|div|span|hr)( [^<>]*)?/?>|<br>", "", everything)
    assert "<" not in ours and "&lt;" in shown(browser) and "&lt;b&gt;" in browser._head.value
    assert len(browser.matches) == 1


def test_without_widgets_it_is_the_row_with_brackets(rows, dialogues):
    bundle = rows._repr_mimebundle_()
    first = next(item for item in dialogues if f" {item.id} " in rows._head.value)
    assert f"[{first.answer}END]" in bundle["text/plain"] == repr(rows)
    assert inline("trained") in bundle["text/html"] and "application/vnd.jupyter.widget-view+json" in bundle


def test_an_emoji_of_several_tokens_is_shown_whole(tokenizer):
    ids = tokenizer("a 🎂🥶 b", add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == "a 🎂🥶 b" and "\ufffd" not in "".join(texts)
    half = token_texts(ids[:2], tokenizer)
    assert len(half) == 2 and half[-1], "half a character at the end is not lost"


@pytest.fixture
def chats(tmp_path):
    """A file with conversations, two of which can't be used, and one row twice."""
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "What is {}? <b>"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
        {"role": "assistant", "content": "Two.", "weight": 0},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Any time."},
    ]
    rows = [json.loads(json.dumps({"messages": turns}).replace("{}", str(number))) for number in range(12)]
    rows[2]["messages"] = rows[2]["messages"][:1]
    rows[3]["messages"][1] = {"role": "someone", "content": "x"}
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, rows[5]])))
    return path


def test_a_row_is_shown_as_the_turns_of_its_source(chats, tokenizer):
    corpus = read_corpus(DataConfig(source=str(chats)))
    browser = row_browser(prepared_data(corpus, tokenizer, source=str(chats), seq_len_tokens=512), tokenizer)
    turns = find(browser.box, "qlora-row-turns").value
    marks = re.findall(r'<li class="turn ([a-z-]*)">', turns)
    assert marks == ["", "trained", "", "not-trained", "", "trained"]
    assert "calls <code>add</code>" in turns and "the data say that it is not trained" in turns
    assert "&lt;b&gt;" in turns and "<b>?" not in turns
    where = re.search(r"chats.jsonl line (\d+)", browser._head.value)[1]
    assert f"What is {int(where) - 1}?" in turns, "the turns are those of the row"
    assert f"What is {int(where) - 1}?" in of_kind(shown(browser), "masked")


def test_turns_of_a_source_that_has_changed_are_not_shown(chats, tokenizer):
    corpus = read_corpus(DataConfig(source=str(chats)))
    data = prepared_data(corpus, tokenizer, source=str(chats), seq_len_tokens=512)
    chats.write_text(chats.read_text().replace("Any time", "Any day"))
    assert "the source has changed" in find(row_browser(data, tokenizer).box, "qlora-row-turns").value
    chats.unlink()
    assert "The turns are not shown: no such file" in find(row_browser(data, tokenizer).box, "qlora-row-turns").value
    assert "turn trained" in find(row_browser(data, tokenizer, corpus=corpus).box, "qlora-row-turns").value


def test_a_large_source_is_read_when_a_person_asks(chats, tokenizer, monkeypatch):
    monkeypatch.setattr(row_turns, "AT_ONCE_BYTES", 10)
    corpus = read_corpus(DataConfig(source=str(chats)))
    browser = row_browser(prepared_data(corpus, tokenizer, source=str(chats), seq_len_tokens=512), tokenizer)
    button = find(browser.box, "qlora-read-turns")
    assert find(browser.box, "qlora-row-turns").value == "" and button.layout.display == ""
    button.click()
    assert "turn trained" in find(browser.box, "qlora-row-turns").value and button.layout.display == "none"


def test_rows_that_are_left_out_are_named_with_their_reasons(chats, tokenizer):
    corpus = read_corpus(DataConfig(source=str(chats)))
    browser = row_browser(prepared_data(corpus, tokenizer, source=str(chats), seq_len_tokens=512), tokenizer)
    browser._split.value = "left out"
    assert "3 rows are left out" in browser._head.value and "a duplicate" in browser._head.value
    for line in (3, 4, 13):
        assert f"chats.jsonl line {line}</th>" in shown(browser)
    assert "a duplicate of chats.jsonl line 6" in shown(browser)
    assert browser._moves.layout.display == "none" and not find(browser.box, "qlora-row-turns").value
    browser._split.value = "train"
    assert "train row 1 of" in browser._head.value and browser._moves.layout.display == ""
    assert "3 rows are left out" in repr(browser) and "a duplicate of" in browser.still_html()


def test_rows_left_out_are_counted_by_their_notes():
    skipped = SkippedRows()
    for number in range(60):
        skipped.add(
            f"rows.jsonl line {number}",
            *(("a duplicate", " of rows.jsonl line 1") if number % 3 else ("no answer", "")),
        )
    found = left_out(["something else", *skipped.notes()])
    assert found.count == 60 and len(found.named) == 20
    assert found.kinds() == {"a duplicate": 40, "no answer": 20}
    assert left_out([]).count == 0
