"""Reads rows from CSV and TSV files: separator and quoting are recognised from the first lines, and a doubtful one is refused."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import brief, size_text
from qlora_helpers.data import encodings
from qlora_helpers.data.compressed import opened
from qlora_helpers.data.encodings import numbered_lines
from qlora_helpers.data.headers import checked_header, without_a_row_as_header
from qlora_helpers.data.rows import Row, listed

SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_WRITTEN = {"\t": "\\t"}
_SAMPLE_LINES = 500
_SAMPLE_CHARACTERS = 1_000_000
_SEP_LINE = re.compile(r'\ufeff?"?sep=(.)"?\s*', re.IGNORECASE)  # Excel's own first line
_STYLES: tuple[dict[str, Any], ...] = ({}, {"doublequote": False, "escapechar": "\\"})


@dataclass(frozen=True)
class Dialect:
    """How a file's lines are divided into fields.

    Attributes:
        separator: the character between fields.
        style: further arguments of `csv.reader`.
        names: the fields of the first row.
        fits: share of the sample's other rows that have as many fields.
        whole: whether the sample is valid under it.
    """

    separator: str
    style: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    fits: float = 1.0
    whole: bool = True

    @property
    def rank(self) -> tuple[bool, float, bool]:
        """What speaks for it: valid, rows of one length, no name in which another separator stands."""
        return self.whole, self.fits, not any(other in name for name in self.names for other in SEPARATORS)


def csv_rows(
    path: Path, name: str, encoding: str, config: DataConfig, notes: list[str], *, tabs: bool = False
) -> Iterator[Row]:
    """Yields the rows of a file with a header.

    Args:
        path: the file.
        name: its name, for messages.
        encoding: of its text.
        config: the separator, where the settings name one.
        notes: gets a line where the separator is not a comma, or quotes are escaped by backslashes.
        tabs: whether the file's name says that tabs divide it.

    Raises:
        DataError: its first line is no header, a row has another number of fields, or it is not valid CSV; the message names the
            line.
    """
    csv.field_size_limit(
        max(csv.field_size_limit(), encodings.MAX_LINE_BYTES)
    )  # of the process; it only ever grows here
    with opened(path) as file:
        lines = numbered_lines(file, name, encoding)
        sample = _sample(lines)
        first = 0
        named = _SEP_LINE.fullmatch(sample[0][1]) if sample else None
        if named:
            sample, first = sample[1:], 1
        asked = config.separator or (named[1] if named else None)
        whole = len(sample) < _SAMPLE_LINES and sum(len(line) for _, line in sample) < _SAMPLE_CHARACTERS
        found = recognised([line for _, line in sample], name, asked, tabs=tabs, whole=whole)
        _say(found, name, tabs, asked, notes)
        reader = csv.reader(
            (line for _, line in chain(sample, lines)), delimiter=found.separator, strict=True, **found.style
        )
        yield from without_a_row_as_header(_rows(reader, name, first), f"{name} line {first + 1}", config)


def recognised(lines: list[str], name: str, asked: str | None, *, tabs: bool, whole: bool) -> Dialect:
    """Returns how a file's first lines are divided.

    Args:
        lines: the first lines, with their ends.
        name: the file's name, for messages.
        asked: the separator that the settings name, or None.
        tabs: whether the file's name says that tabs divide it.
        whole: whether these are all lines.

    Raises:
        DataError: several separators divide it equally well.
    """
    if asked is not None and len(asked) != 1:
        raise DataError(f"data.separator is {asked[:20]!r}", expected="one character, such as ; or \\t")
    separators = [asked] if asked else ["\t", *SEPARATORS] if tabs else list(SEPARATORS)
    tried = [_tried(lines, separator, whole) for separator in dict.fromkeys(separators)]
    if asked:
        return tried[0]
    several = [each for each in tried if len(each.names) > 1]
    if not several:
        return tried[0]
    if tabs and several[0].separator == "\t":
        return several[0]
    best = max(each.rank for each in several)
    found = [each for each in several if each.rank == best]
    if len(found) == 1:
        return found[0]
    ways = " or ".join(f"`--set data.separator='{_WRITTEN.get(each.separator, each.separator)}'`" for each in found)
    raise DataError(
        f"{name} can be divided into columns in several ways",
        got="; ".join(f"by {SEPARATORS[each.separator]}: {listed(each.names, 4)}" for each in found),
        next_step=f"Name the separator: {ways}.",
    )


def _sample(lines: Iterator[tuple[int, str]]) -> list[tuple[int, str]]:
    found, size = [], 0
    for number, line in islice(lines, _SAMPLE_LINES):
        found.append((number, line))
        size += len(line)
        if size >= _SAMPLE_CHARACTERS:
            break
    return found


def _tried(lines: list[str], separator: str, whole: bool) -> Dialect:
    """Divides the sample, by the first style of quoting under which it is valid."""
    tried = []
    escaped = any('\\"' in line for line in lines)
    for style in _STYLES if escaped else _STYLES[:1]:
        rows: list[list[str]] = []
        reader = csv.reader(lines, delimiter=separator, strict=True, **style)
        try:
            rows.extend(reader)
            valid = True
        except csv.Error:
            valid = not whole and reader.line_num == len(lines) and len(rows) > 1  # a row that the sample cut off
        if len(rows) > 1 and any(name.startswith(" ") for name in rows[0][1:]) and not style:
            return _tried_spaced(lines, separator)
        names = tuple(map(str.strip, rows[0])) if rows else ()
        others = [len(row) == len(names) for row in rows[1:] if row]
        fits = sum(others) / len(others) if others else 1.0
        tried.append(Dialect(separator, style, names, fits, valid))
        if valid:
            return tried[-1]
    return tried[0]


def _tried_spaced(lines: list[str], separator: str) -> Dialect:
    """Divides lines whose separator is followed by a blank, which is part of no field."""
    style: dict[str, Any] = {"skipinitialspace": True}
    try:
        rows = [row for row in csv.reader(lines, delimiter=separator, strict=True, **style) if row]
    except csv.Error:
        return Dialect(separator, style, (), 0.0, False)
    fits = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
    return Dialect(separator, style, tuple(map(str.strip, rows[0])), fits, True)


def _say(found: Dialect, name: str, tabs: bool, asked: str | None, notes: list[str]) -> None:
    said = []
    if not asked and len(found.names) > 1 and found.separator != ("\t" if tabs else ","):
        said.append(f"{SEPARATORS[found.separator]} divides its columns (data.separator chooses otherwise)")
    if "escapechar" in found.style:
        said.append("backslashes stand before quotes within a text")
    note = f"{name}: {', and '.join(said)}"
    if said and note not in notes:
        notes.append(note)


def _rows(reader: Any, name: str, first: int) -> Iterator[Row]:
    header: list[str] = []
    empty, start = True, first + 1
    try:
        for fields in reader:
            if not header:
                header = checked_header([column.strip() for column in fields], f"{name} line {start}")
            elif fields and len(fields) != len(header):
                raise DataError(
                    f"{name} line {start} has a wrong number of fields",
                    expected=f"{len(header)} ({listed(header)})",
                    got=f"{len(fields)}",
                    next_step="Put texts that hold separators or line breaks into double quotes, or name the separator: "
                    "data.separator.",
                )
            elif fields:
                empty = False
                yield Row(f"{name} line {start}", dict(zip(header, fields, strict=True)))
            start = first + reader.line_num + 1
    except csv.Error as error:
        if "field limit" in str(error):
            raise DataError(
                f"{name} line {start} has a text that is too long",
                expected=f"{size_text(csv.field_size_limit())} at most",
                next_step="Look for an unclosed double quote in that row; if it is one text, shorten it.",
            ) from error
        raise DataError(
            f"{name} line {start} is not valid CSV ({brief(error)})",
            next_step="Look for an unclosed or undoubled double quote in that row.",
        ) from error
    if empty:
        raise DataError(f"{name} holds no rows", next_step="Check that it was written or copied whole.")
