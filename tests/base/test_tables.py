"""Tables as text and as HTML."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from qlora_helpers.base.style import colour, inline, stylesheet
from qlora_helpers.base.tables import Table, Tabular, html_table, text_table
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


def test_no_page_draws_formulas_out_of_foreign_texts():
    """MathJax leaves out elements of the class that its version looks for; each element with texts carries both."""
    html = Table(["$h$"], [[r"$\phantom{a}$"]], caption="$c$", notes=["$n$"])._repr_html_()
    assert [tag[1] for tag in re.finditer(r'<(\w+) class="mathjax_ignore tex2jax_ignore"', html)] == ["table", "p"]
    assert all("$" not in text for text in re.split(r"<table.*?</table>|<p class.*?</p>", html))


def test_control_characters_are_removed_from_foreign_texts():
    """Colours, titles, one-byte codes (C1), bells, overrides of the writing direction, halves of characters."""
    text = "a\x1b[1;31mb\x9b0mc\x1b]0;title\x07d\x07e\x85\x7ff\u202e\u202dg\u2066\u2069h\ud83di\n\tj👍\u200f"
    assert plain(text) == "abcdefghi\n\tj👍\u200f"


def test_levels_have_a_word_and_a_colour():
    html = html_table(["", "what"], [["warning", "a warning about something"], ["ok", "ok"]])
    assert html.count("background:#") == 2
    assert ">warning</span>" in html and ">ok</span>" in html
    assert ">ok</td>" in html, "only a column without a name holds levels"


@dataclass(frozen=True)
class Counts(Tabular):
    """A data class that says nothing but its table."""

    first: int
    second: str

    def table(self) -> Table:
        return Table((), [["first", self.first], ["<b>", self.second]], caption="a count", notes=["<i>"], numbers=(1,))


def test_a_data_class_prints_and_shows_its_table():
    counts = Counts(1200, "x")
    assert repr(counts).splitlines() == ["a count", "first  1200", "<b>       x", "<i>"]
    html = counts._repr_html_()
    assert "<thead>" not in html and html.count("<td ") == 4 and html.count("text-align:right") == 2
    assert "&lt;b&gt;" in html and "&lt;i&gt;" in html and ">a count</caption>" in html


def test_a_subclass_keeps_the_text_that_its_parent_prints():
    class Loud(Counts):
        def __repr__(self) -> str:
            return "loud"

    @dataclass(frozen=True)
    class Louder(Loud):
        third: int = 3

    assert repr(Louder(1, "x")) == "loud"


def test_a_table_without_rows_is_its_caption():
    empty = Table((), (), caption="no runs <yet>")
    assert repr(empty) == "no runs <yet>" and empty._repr_html_() == "<p>no runs &lt;yet&gt;</p>"


def test_rows_of_unequal_length_are_refused():
    for show in (text_table, html_table):
        with pytest.raises(ValueError, match="zip"):
            show(["a", "b"], [["1", "2"], ["1"]])


def test_inlined_looks_name_their_colours():
    """An element's `style` must not refer to variables, which a page without the stylesheet does not define."""
    looks = inline("badge", "failure")
    assert "var(" not in looks and f"background:{colour('bad')}" in looks
    with pytest.raises(KeyError):
        inline("unknown")


def test_every_variable_is_defined_in_the_stylesheet():
    sheet = stylesheet("colours", "still", "panel", "report")
    defined = set(re.findall(r"(--qlora-[\w-]+):", sheet))
    assert set(re.findall(r"var\((--qlora-[\w-]+)", sheet)) <= defined
    assert "/*" not in sheet and sheet.count("{") == sheet.count("}")
