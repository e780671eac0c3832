"""Small tables for results: fixed-width text when printed, HTML for light and dark themes in a notebook.

This module lays a table out; its colours and spacing are in `style.css`, its contents are the caller's. Standard library alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from typing import Any

from qlora_helpers.base.config import describe
from qlora_helpers.base.style import inline

BADGES = ("ok", "warning", "failure")
"""In a column without a name, a cell that holds one of these words is shown as a coloured badge."""


AS_TEXT = 'class="mathjax_ignore tex2jax_ignore"'
"""For elements with texts of files: JupyterLab would draw what stands between dollar signs as a formula, which can hide it."""


class Table:
    """Rows that print as fixed-width text and show as HTML in a notebook.

    Args:
        header: the names of the columns; empty for rows that need none, such as pairs of a name and a value.
        rows: the cells; whatever is not text is shown as Python prints it.
        caption: what the table shows, in a line above it.
        notes: lines below it.
        numbers: the columns that are aligned right.

    Attributes:
        below: further tables, between this one and its notes.
    """

    def __init__(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        caption: str = "",
        notes: Sequence[str] = (),
        numbers: Collection[int] = (),
    ) -> None:
        self.header = list(header)
        self.rows = [[str(cell) for cell in row] for row in rows]
        self.caption, self.notes, self.numbers = caption, list(notes), numbers
        self.below: list[Table] = []

    def __repr__(self) -> str:
        table = [text_table(self.header, self.rows, numbers=self.numbers)] if self.header or self.rows else []
        below = [text for each in self.below for text in ("", repr(each), "")]
        return "\n".join([*filter(None, [self.caption]), *table, *below, *self.notes])

    def _repr_html_(self) -> str:
        if self.header or self.rows:
            table = html_table(self.header, self.rows, caption=self.caption, numbers=self.numbers)
        else:
            table = f"<p>{escape(self.caption)}</p>"
        table += "".join(each._repr_html_() for each in self.below)
        return table + "".join(f'<p {AS_TEXT} style="{inline("note")}">{escape(note)}</p>' for note in self.notes)


class Tabular:
    """A base for data classes that show as a table: the class says its `table()`, and text and HTML follow from it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # @dataclass writes a `__repr__` into every class that has none of its own, and would hide the inherited one.
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def table(self) -> Table:
        """Returns the table that is printed and shown."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def settings_table(section: object) -> Table:
    """Returns a configuration section as a table: each setting, its value and what it does, in the configuration's own words."""
    rows = [(row["name"], "none" if row["value"] is None else row["value"], row["text"]) for row in describe(section)]
    return Table(["setting", "value", "what it does"], rows)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Collection[int] = ()) -> str:
    """Returns a table in fixed-width text.

    Args:
        header: the names of the columns; empty for none.
        rows: the cells, as many in each row as in the header.
        numbers: the columns that are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(*([header] if header else []), *rows, strict=True)]
    lines = []
    for row in [*([header, ["-" * width for width in widths]] if header else []), *rows]:
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", numbers: Collection[int] = ()
) -> str:
    """Returns a table in HTML. Every cell is escaped; those of `BADGES` become coloured badges.

    Apart from the badges its colours are the page's own, so that it reads well in light and dark themes.

    Args:
        header: the names of the columns; empty for none.
        rows: the cells, as many in each row as in the header.
        caption: what the table shows.
        numbers: the columns that are aligned right.
    """
    sides = ["number" if column in numbers else "left" for column in range(len(header or rows[0]))]
    head = "".join(
        f'<th scope="col" style="{inline("head", side)}">{escape(cell)}</th>' if cell else "<td></td>"
        for cell, side in zip(header, sides, strict=bool(header))
    )
    head = f"<thead><tr>{head}</tr></thead>" if header else ""
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="{inline("cell", side)}">{_cell(cell, is_level=name == "")}</td>'
            for cell, side, name in zip(row, sides, header or row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    title = f'<caption style="{inline("caption")}">{escape(caption)}</caption>' if caption else ""
    return f'<table {AS_TEXT} style="{inline("table")}">{title}{head}<tbody>{body}</tbody></table>'


def _cell(text: str, *, is_level: bool) -> str:
    return f'<span style="{inline("badge", text)}">{text}</span>' if is_level and text in BADGES else escape(text)
