"""The first line of a table: the columns' names, each once; a row of data that stands there is not taken for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from statistics import median

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data.rows import Row, listed

MAX_COLUMNS = 10_000
_SAMPLE_ROWS = 200
_NAME_WORDS, _NAME_CHARACTERS = (
    4,
    100,
)  # a name of more words is doubted where its column holds texts like it; of more characters, always
_DEFAULTS = DataConfig()


def checked_header(fields: list[str], place: str) -> list[str]:
    """Returns the names of a table's columns.

    Raises:
        DataError: one is repeated, there is none, or there are too many.
    """
    repeated = [column for column, count in Counter(fields).items() if count > 1]
    many = len(fields) > MAX_COLUMNS
    if repeated or not fields or many:
        raise DataError(
            f"{place} is not a header",
            expected=f"the columns' names, each once, {MAX_COLUMNS:,} at most",
            got=f"{len(fields):,} names" if many else f"{listed(repeated)} repeated" if repeated else "an empty line",
            next_step="Give the first line one name for each column.",
        )
    return fields


def without_a_row_as_header(rows: Iterator[Row], place: str, config: DataConfig) -> Iterator[Row]:
    """Yields a table's rows, once it is clear that their columns' names are names.

    Args:
        rows: each with its columns by name, all of the same names.
        place: where the names stand, for messages.
        config: settings that name columns end the doubt.

    Raises:
        DataError: the names look like a row.
    """
    first = list(islice(rows, _SAMPLE_ROWS))
    named = (config.prompt, config.answer, config.column)
    names_are_set = any(named) or (config.dialogue_column, config.summary_column) != (
        _DEFAULTS.dialogue_column,
        _DEFAULTS.summary_column,
    )
    if first and not names_are_set:
        names = list(first[0].values)
        columns = {name: [str(row.values[name] or "").strip() for row in first] for name in names}
        if _is_a_row(columns):
            raise DataError(
                f"{place} looks like a row, and has to hold the columns' names",
                expected="a line such as question,answer",
                got=listed(names, 4),
                next_step="Put a line of names before it. If these are the names, name the columns: data.prompt and data.answer.",
            )
    yield from chain(first, rows)


def _is_a_row(columns: dict[str, list[str]]) -> bool:
    """Whether columns' names look like their values: one is a value that is seen again, or all are texts like those."""
    filled = {name: [value for value in values if value] for name, values in columns.items() if name}
    filled = {name: values for name, values in filled.items() if values}
    if any(
        len(name) > _NAME_CHARACTERS or (values.count(name) > 1 and len(set(values)) > 1)
        for name, values in filled.items()
    ):
        return True
    return bool(filled) and all(
        len(name.split()) >= _NAME_WORDS and len(name) >= median(map(len, values)) / 2
        for name, values in filled.items()
    )
