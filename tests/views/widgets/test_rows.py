"""The browser of prepared rows, without a browser."""

from __future__ import annotations

import re

import pytest
from tiny import prepared_data

from qlora_helpers.base.errors import DataError
from qlora_helpers.base.style import inline
from qlora_helpers.data.examples import one_turn
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.data.sources import Corpus
from qlora_helpers.views.tokens import token_texts
from qlora_helpers.views.widgets import row_browser


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
    number.value = 5
    assert rows.index == 4
    number.value = 99
    assert "numbered 1 to 6" in rows._found.value and rows.index == 4
    find(rows.box, "qlora-previous").click()
    assert (rows.index, number.value) == (3, 4)


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
