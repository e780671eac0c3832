"""Tables as text and as HTML."""

from __future__ import annotations

from qlora_helpers.tables import html_table, text_table


def test_text_columns_line_up_with_numbers_on_the_right():
    text = text_table(["name", "GiB"], [["a", "12.5"], ["longer", "3"]], numbers=[1])
    assert text.splitlines() == ["name     GiB", "------  ----", "a       12.5", "longer     3"]


def test_html_is_escaped_everywhere():
    html = html_table(["<h>"], [["<b>&"]], caption="<i>")
    assert "&lt;h&gt;" in html
    assert "&lt;b&gt;&amp;" in html
    assert "&lt;i&gt;" in html
    assert not any(tag in html for tag in ("<h>", "<b>", "<i>"))


def test_levels_are_told_by_word_and_colour():
    html = html_table(["", ""], [["warning", "a warning about something"]])
    assert html.count("background:#") == 1
    assert ">warning</span>" in html
