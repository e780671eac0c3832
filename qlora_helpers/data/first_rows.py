"""Reads the first rows of a source, for a look at them while settings are chosen: a bounded part, whatever the source's size.

Recognises and converts rows exactly as a run does (`sources`); makes no splits, and looks for no repeats. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.text import size_text
from qlora_helpers.data.conversion import Conversion, first_values
from qlora_helpers.data.examples import Example
from qlora_helpers.data.forms import Form, recognised
from qlora_helpers.data.local_files import local_files
from qlora_helpers.data.rows import Part, Row, SkippedRows
from qlora_helpers.data.sources import EMBEDDED, open_source

FIRST_ROWS = 20
MOST_WHOLE_BYTES = 64 << 20
"""A file that can only be read whole is looked at up to this size."""
_WHOLE = (".json", ".7z", ".xlsx", ".gz", ".zst")  # all of these are read, or unpacked, before their first row is known


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a source.

    Attributes:
        rows: the usable ones, as training gets them.
        form: what the rows were recognised as, in words; empty where nothing was read.
        notes: how the source was read, and rows that are left out, each with its place and its reason.
        columns: the source's columns, in their order.
        unread: why nothing was read; empty where rows were.
    """

    rows: tuple[Example, ...] = ()
    form: str = ""
    notes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    unread: str = ""


def first_rows(config: DataConfig, most: int = FIRST_ROWS) -> FirstRows:
    """Reads the first rows of a source that is on this disk.

    Args:
        config: the source, and what its rows are.
        most: how many rows are converted at most, usable or not.

    Raises:
        DataError: the source is not there, or its rows can't be read as the settings say.
    """
    unread = _why_not(config)
    if unread:
        return FirstRows(unread=unread)
    if config.source in EMBEDDED and config.prompt is None and config.answer is None:
        config = replace(config, prompt=EMBEDDED[config.source][1], answer=EMBEDDED[config.source][2])
    source = open_source(config)
    parts = source.splits.get("train") or [part for several in source.splits.values() for part in several]
    kinds = {column: kind for part in parts for column, kind in part.kinds.items()}
    columns, said = first_values(parts[:1]), list[str]()
    form = recognised(source.name, columns, kinds, config, said) if columns else Form("dialogue")
    skipped = SkippedRows()
    conversion = Conversion(form, config, skipped)
    rows = tuple(conversion.examples(_first(parts, most)))
    notes = (*dict.fromkeys(source.notes), *skipped.notes())
    named = str(form) if form.columns else f"{form.name} (by data.prompt and data.answer)"
    return FirstRows(rows, named, notes, tuple(columns))


def _first(parts: list[Part], most: int) -> Iterator[Row]:
    left = most
    for part in parts:
        for row in islice(part.rows(None), left):
            left -= 1
            yield row
        if not left:
            return


def _why_not(config: DataConfig) -> str:
    """Says why a source isn't looked at: it is elsewhere, or it is large and can only be read whole."""
    name = config.source
    if name in EMBEDDED:
        return ""
    files = None if "://" in name else local_files(name)
    if files is None:
        return f"{name} isn't on this disk: its rows are shown once they are prepared (ql.row_browser)."
    large = max(files[:1], key=_size)
    if large.suffix.lower() in _WHOLE and _size(large) > MOST_WHOLE_BYTES:
        size, limit = size_text(_size(large)), size_text(MOST_WHOLE_BYTES)
        return f"{large.name} has {size} and can only be read whole; rows of such a file are shown up to {limit}."
    return ""


def _size(path: Path) -> int:
    return path.stat().st_size
