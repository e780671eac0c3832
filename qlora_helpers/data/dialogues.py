"""Turns raw rows into clean examples, with a note on every row that is skipped.

Owns the columns and the cleaning of texts. Rows are read in `readers` and `archives` and divided in
`splits`. Knows nothing of files, tokens or models.
"""

from __future__ import annotations

import difflib
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import CONTROLS, SURROGATES
from qlora_helpers.data.examples import SUMMARIZE, Example, one_turn

SPLITS = ("train", "eval", "test")
MIN_ROWS = 3
MAX_NAMED = 20


@dataclass(frozen=True)
class Row:
    """A row as its source gives it: `values` should be a mapping of columns, `where` tells a person where the row is."""

    where: str
    values: Any


@dataclass
class Source:
    """The rows that a reader found.

    Attributes:
        name: the file's name (no folder), or the hub's id.
        licence: the terms of the texts, in words.
        splits: rows by `train`, `eval` and `test`; a source without splits of its own has only `train`.
        notes: what a person should know about how it was read.
    """

    name: str
    licence: str
    splits: dict[str, list[Row]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, repr=False)
class Corpus:
    """Examples in three splits that share none; `notes` name what was skipped, cut or changed."""

    name: str
    licence: str
    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    test: tuple[Example, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, split))} {split}" for split in SPLITS)
        count = len(self.notes)
        return f"Corpus({self.name!r}: {sizes}; licence: {self.licence}; {count} note{'s' * (count != 1)})"


def listed(names: Iterable[Any], most: int = 12) -> str:
    """Lists names for a message: the first `most` quoted, so that no control character reaches a terminal, then a count."""
    quoted = [repr(name if len(str(name)) <= 60 else f"{str(name)[:57]}...") for name in names]
    rest = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + rest if quoted else "none"


class SkippedRows:
    """The rows that are not used: where each of them is, and why it was skipped."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, where: str, kind: str, detail: str = "") -> None:
        """Adds a row: `kind` is a reason that rows are counted by, `detail` what else is known of this row."""
        self.rows.append((where, kind, detail))

    def notes(self, most: int = MAX_NAMED) -> list[str]:
        """Returns a line for each of the first `most` rows, and one that counts the rest by kind."""
        named = [f"{where}: skipped, {kind}{detail}" for where, kind, detail in self.rows[:most]]
        counts = Counter(kind for _, kind, _ in self.rows[most:])
        rest = "; ".join(f"{count} x {kind}" for kind, count in counts.items())
        return named + ([f"and {counts.total()} more rows skipped: {rest}"] if rest else [])


def need_columns(source: Source, config: DataConfig) -> None:
    """Checks that at least one row has the dialogue and summary columns (single rows without them are skipped later).

    Raises:
        DataError: a column is missing; the message lists those found and suggests the settings that name them.
    """
    found: dict[str, None] = {}  # a dict keeps the order of the file
    for rows in source.splits.values():
        for row in rows:
            if isinstance(row.values, Mapping):
                found.update(dict.fromkeys(row.values))
    wanted = {"dialogue_column": config.dialogue_column, "summary_column": config.summary_column}
    missing = {setting: column for setting, column in wanted.items() if column not in found}
    if not found or not missing:
        return
    settings = " ".join(f"--set data.{setting}={_likely(column, found)}" for setting, column in missing.items())
    raise DataError(
        f"{source.name} has no column {' or '.join(map(repr, missing.values()))}",
        got=f"the columns {listed(found)}",
        next_step=f"Name the right one: `{settings}`.",
    )


def _likely(column: str, found: Iterable[str]) -> str:
    by_lower = {str(name).lower().strip(): str(name) for name in found}
    close = difflib.get_close_matches(column.lower(), by_lower, n=1, cutoff=0.5)
    return shlex.quote(by_lower[close[0]]) if close and by_lower[close[0]].isprintable() else "NAME"


def cleaned(source: Source, config: DataConfig, notes: list[str], skipped: SkippedRows) -> dict[str, list[Example]]:
    """Turns the source's rows into examples, split by split.

    Line ends become \\n. Control characters other than \\n and \\t are removed, including overrides of the writing direction;
    a line in `notes` counts them. Rows without a text in both columns go to `skipped`. An id that is missing or was seen
    before is replaced by the row's `where`.
    """
    splits: dict[str, list[Example]] = {}
    ids: set[str] = set()
    removed = touched = 0
    for split, rows in source.splits.items():
        splits[split] = []
        for row in rows:
            texts = _texts(row, config, skipped)
            if texts is None:
                continue
            (dialogue, summary), count = texts
            removed, touched = removed + count, touched + (count > 0)
            row_id = _id(row.values.get("id"))
            if row_id is None or row_id in ids:
                row_id = row.where
            ids.add(row_id)
            splits[split].append(
                one_turn(
                    row_id,
                    row.where,
                    dialogue,
                    summary,
                    instruction=SUMMARIZE if config.instruction is None else config.instruction,
                    system=config.system or "",
                    references=_references(row, config),
                )
            )
    if removed:
        notes.append(f"{source.name}: removed {removed} control characters (rows touched: {touched})")
    return splits


def _texts(row: Row, config: DataConfig, skipped: SkippedRows) -> tuple[tuple[str, str], int] | None:
    """Returns a row's dialogue and summary and how many control characters were removed, or None where it can't be used."""
    if not isinstance(row.values, Mapping):
        skipped.add(row.where, "not an object with columns", f" but {type(row.values).__name__}")
        return None
    texts = []
    removed = 0
    for role, column in (("dialogue", config.dialogue_column), ("summary", config.summary_column)):
        value = row.values.get(column)
        if value is not None and not isinstance(value, str):
            skipped.add(row.where, f"its {role} is not text", f" but {type(value).__name__}")
            return None
        text, count = _without_controls(value or "")
        if not text.strip():
            skipped.add(row.where, f"its {role} is {'missing' if value is None else 'empty'}")
            return None
        if SURROGATES.search(text):  # half an emoji: no tokenizer takes it
            skipped.add(row.where, f"its {role} holds half a character (an unpaired surrogate)")
            return None
        texts.append(text)
        removed += count
    return (texts[0], texts[1]), removed


def _without_controls(text: str) -> tuple[str, int]:
    """Returns a text with plain line ends and without control characters, and how many of these there were."""
    return CONTROLS.subn("", text.replace("\r\n", "\n").replace("\r", "\n"))


def numbered_siblings(column: str, found: Iterable[str]) -> list[str]:
    """Other columns with the same name but for a number at its end: `summary2` and `summary3` beside `summary1` or `summary`."""
    stem = column.rstrip("0123456789")
    return [name for name in found if name != column and name.startswith(stem) and name[len(stem) :].isdecimal()]


def _references(row: Row, config: DataConfig) -> tuple[str, ...]:
    """Returns the usable texts of the summary column's numbered siblings, cleaned like the summary."""
    found = []
    for column in numbered_siblings(config.summary_column, [name for name in row.values if isinstance(name, str)]):
        value = row.values[column]
        text = _without_controls(value)[0] if isinstance(value, str) else ""
        if text.strip() and not SURROGATES.search(text):
            found.append(text)
    return tuple(found)


def _id(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value).strip()
    return text if text and text.isprintable() and len(text) <= 100 else None


def need_rows(name: str, splits: dict[str, list[Example]], skipped: SkippedRows, each: bool = False) -> None:
    """Checks that there are `MIN_ROWS` rows, and with `each` at least one in every split.

    Raises:
        DataError: there are fewer; the message says which rows were skipped, and why.
    """
    counts = {split: len(splits.get(split, [])) for split in SPLITS}
    total = sum(counts.values())
    if total >= MIN_ROWS and (not each or all(counts.values())):
        return
    reasons = "".join(f"\n  - {note}" for note in skipped.notes(5))
    raise DataError(
        f"{name} has too few usable rows",
        expected=f"at least {MIN_ROWS}, one or more for each of train, eval and test",
        got=", ".join(f"{count} {split}" for split, count in counts.items()) if each else str(total),
        next_step=f"Add rows, or fix those that were skipped:{reasons}" if reasons else "Add rows.",
    )
