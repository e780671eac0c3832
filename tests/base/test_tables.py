"""Tables as text and as HTML."""

from __future__ import annotations

from qlora_helpers.base.tables import html_table, text_table
from qlora_helpers.base.text import plain


def test_text_columns_line_up_with_numbers_on_the_right():
    text = text_table(["name", "GiB"], [["a", "12.5"], ["longer", "3"]], numbers=[1])
    assert text.splitlines() == ["name     GiB", "------  ----", "a       12.5", "longer     3"]


def test_html_is_escaped_everywhere():
    html = html_table(["<h>"], [["<b>&"]], caption="<i>")
    assert "&lt;h&gt;" in html
    assert "&lt;b&gt;&amp;" in html
    assert "&lt;i&gt;" in html
    assert not any(tag in html for tag in ("<h>", "<b>", "<i>"))


def test_a_text_from_elsewhere_is_shown_plain():
    """Colours, titles, one-byte codes (C1), bells, overrides of the writing direction, halves of characters."""
    text = "a\x1b[1;31mb\x9b0mc\x1b]0;title\x07d\x07e\x85\x7ff\u202e\u202dg\u2066\u2069h\ud83di\n\tj👍\u200f"
    assert plain(text) == "abcdefghi\n\tj👍\u200f"


def test_levels_are_told_by_word_and_colour():
    html = html_table(["", ""], [["warning", "a warning about something"]])
    assert html.count("background:#") == 1
    assert ">warning</span>" in html
