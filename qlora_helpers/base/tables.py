"""Small tables for results: fixed-width text where they are printed, HTML for light and dark themes in a notebook.

This module owns their looks and knows nothing about what they say. Standard library alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

from qlora_helpers.base.config import describe


class Table:
    """Rows that print as fixed-width text and show as HTML in a notebook.

    Args:
        header: the names of the columns.
        rows: the cells; whatever is no text is shown as Python prints it.
        caption: what the table shows (HTML alone).
        numbers: the columns that are set flush right.
    """

    def __init__(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        caption: str = "",
        numbers: Collection[int] = (),
    ) -> None:
        self.header = list(header)
        self.rows = [[str(cell) for cell in row] for row in rows]
        self.caption, self.numbers = caption, numbers

    def __repr__(self) -> str:
        return text_table(self.header, self.rows, numbers=self.numbers)

    def _repr_html_(self) -> str:
        return html_table(self.header, self.rows, caption=self.caption, numbers=self.numbers)


def settings_table(section: object) -> Table:
    """A configuration section as a table: each setting, its value and what it does (the configuration's own text)."""
    rows = [(row["name"], "none" if row["value"] is None else row["value"], row["text"]) for row in describe(section)]
    return Table(["setting", "value", "what it does"], rows)


# White text is readable on each of them, so that a badge looks the same in either theme.
BADGES = {"ok": "#1a7f37", "warning": "#9a6700", "failure": "#cf222e"}
_PADDING = "padding:.25em .75em"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Collection[int] = ()) -> str:
    """A table in fixed-width text.

    Args:
        header: the names of the columns.
        rows: the cells, as many in each row as in the header.
        numbers: the columns that are set flush right.
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", numbers: Collection[int] = ()
) -> str:
    """A table in HTML; every cell is escaped, and a cell that says ok, warning or failure becomes a coloured badge.

    Colours are the page's own but for the badges, so that it reads well in light and dark themes.

    Args:
        header: the names of the columns.
        rows: the cells, as many in each row as in the header.
        caption: what the table shows.
        numbers: the columns that are set flush right.
    """
    sides = ["right" if column in numbers else "left" for column in range(len(header))]
    head = "".join(
        f'<th scope="col" style="text-align:{side};{_PADDING}">{escape(cell)}</th>'
        for cell, side in zip(header, sides, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="text-align:{side};{_PADDING};border-top:1px solid rgba(128,128,128,.3)">{_cell(cell)}</td>'
            for cell, side in zip(row, sides, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    title = f'<caption style="text-align:left;{_PADDING}">{escape(caption)}</caption>' if caption else ""
    return (
        '<table style="border-collapse:collapse;color:inherit;background:transparent">'
        f"{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(text: str) -> str:
    if text not in BADGES:
        return escape(text)
    return f'<span style="background:{BADGES[text]};color:#fff;border-radius:.75em;padding:.1em .6em">{text}</span>'
