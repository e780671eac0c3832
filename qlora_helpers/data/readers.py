"""Reads raw rows from data files, JSON, JSON Lines, CSV and Parquet, each row with its place in the file.

Owns the formats and how they can be damaged: encoding, NUL bytes, broken syntax, sizes. Knows nothing of dialogues and
summaries: what the columns mean, and which rows are usable, is decided in `dialogues`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import brief, size_text
from qlora_helpers.base.units import BYTES_IN_GIB
from qlora_helpers.data.dialogues import Row, listed, numbered_siblings
from qlora_helpers.data.splits import SPLIT_NAMES, named_splits

MAX_FILE_BYTES = 2 * BYTES_IN_GIB
MAX_LINE_BYTES = 10 * 1024**2
_AS_UTF8 = "Save the file as UTF-8 and try again."
_JSON_FORMS = "a list of objects, or an object with the lists train, val and test, or data"

Rows = tuple[dict[str, list[Row]], list[str]]  # by split (see `Source.splits`), and notes


def read_file(path: Path, columns: Collection[str]) -> Rows:
    """Reads a .json, .jsonl, .csv or .parquet file.

    Args:
        path: the file; its suffix says which format it has.
        columns: the columns that are needed; other columns of a Parquet file are not read.

    Returns:
        Rows by split (only `train` where the file has no splits), and notes.

    Raises:
        DataError: the file is empty, too large, damaged or of another kind; the message names the line where there is
            one.
    """
    with open_file(path) as file:
        if path.suffix.lower() == ".parquet":
            return _read_parquet(file, path.name, columns)
        return _TEXT_READERS[path.suffix.lower()](file, path.name)


def open_file(path: Path, most: int = MAX_FILE_BYTES) -> BinaryIO:
    """Opens a plain file of 1 to `most` bytes.

    Raises:
        DataError: it is empty, larger, not a plain file, or may not be read.
    """
    try:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a plain file"
            raise DataError(f"{path.name} is {kind}", expected="a file", next_step="Name the data file itself.")
        file = path.open("rb")
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
    except OSError as error:
        raise DataError(f"{path.name} can't be read ({error.strerror})", next_step="Check its permissions.") from error
    if 0 < size <= most:
        return file
    file.close()
    if size == 0:
        raise DataError(f"{path.name} is empty (0 bytes)", next_step="Check that it was written or copied whole.")
    raise DataError(
        f"{path.name} is too large to be held in memory",
        expected=f"{size_text(most)} at most",
        got=size_text(size),
        next_step="Take a part of it, or unpack what you need, and name that file.",
    )


def read_json(file: BinaryIO, name: str) -> Rows:
    """Reads rows from JSON: a list of objects, `{"train": [...], "val": [...], "test": [...]}` or `{"data": [...]}`.

    Args:
        file: the bytes; UTF-8, with or without a byte order mark.
        name: the file's name, for messages.

    Raises:
        DataError: the bytes are not UTF-8, not JSON, or JSON of another form.
    """
    text = _decoded(file.read(), name, line=1, offset=0)
    value = _parsed(text, name, None, _JSON_FORMS)
    if isinstance(value, dict):
        parts = {key: rows for key, rows in value.items() if key.lower() in SPLIT_NAMES or isinstance(rows, list)}
        wrong = [key for key, rows in parts.items() if not isinstance(rows, list)]
        if any(key.lower() in SPLIT_NAMES for key in parts) and not wrong:
            others = [
                f"{name}: skipped {listed([key])}, which is not a list of rows" for key in value if key not in parts
            ]
            splits, notes = named_splits(name, {key: _numbered(rows, f"{name} {key}") for key, rows in parts.items()})
            return splits, notes + others
        if "data" in parts and not wrong:
            return {"train": _numbered(parts["data"], name)}, []
        value = f"an object with {listed(value)}" if not wrong else f"{listed(wrong)} without a list"
    elif isinstance(value, list):
        if value:
            return {"train": _numbered(value, name)}, []
        value = "an empty list"
    else:
        value = f"a single {type(value).__name__}"
    raise DataError(
        f"{name} holds no rows", expected=_JSON_FORMS, got=value, next_step="Bring it into one of these forms."
    )


def _read_jsonl(file: BinaryIO, name: str) -> Rows:
    hint = "a JSON object on each line (a list over several lines belongs into a .json file)"
    rows = [
        Row(f"{name} line {number}", _parsed(line.rstrip("\r\n"), name, number, hint))
        for number, line in _lines(file, name)
        if line.strip()
    ]
    return {"train": _some(rows, name)}, []


def _read_csv(file: BinaryIO, name: str) -> Rows:
    reader = csv.reader((line for _, line in _lines(file, name)), strict=True)
    header: list[str] = []
    rows = []
    start = 1
    try:
        for fields in reader:
            if not header:
                header = _header(fields, name, start)
            elif fields and len(fields) != len(header):
                raise DataError(
                    f"{name} line {start} has a wrong number of fields",
                    expected=f"{len(header)} ({listed(header)})",
                    got=f"{len(fields)}",
                    next_step="Put texts that hold commas or line breaks into double quotes.",
                )
            elif fields:
                rows.append(Row(f"{name} line {start}", dict(zip(header, fields, strict=True))))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name} line {start} is not valid CSV ({error})",
            next_step="Look for an unclosed or undoubled double quote in that row.",
        ) from error
    return {"train": _some(rows, name)}, []


def _header(fields: list[str], name: str, line: int) -> list[str]:
    fields = [column.strip() for column in fields]
    repeated = [column for column in dict.fromkeys(fields) if fields.count(column) > 1]
    if repeated or not fields:
        raise DataError(
            f"{name} line {line} is not a header",
            expected="the columns' names, each once",
            got=f"{listed(repeated)} repeated" if repeated else "an empty line",
            next_step="Give the first line one name for each column.",
        )
    return fields


def _read_parquet(file: BinaryIO, name: str, columns: Collection[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.ParquetFile(file).schema_arrow.names
        needed = needed_columns(found, columns)
        table = pyarrow.parquet.ParquetFile(file, read_dictionary=needed)  # a repeated text is kept once
        if not needed:
            return {"train": header_only(found, name)}, []
        groups = range(table.metadata.num_row_groups)
        size = sum(table.metadata.row_group(group).total_byte_size for group in groups)
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"{name} is too large to be held in memory",
                expected=f"{size_text(MAX_FILE_BYTES)} of values at most",
                got=size_text(size),
                next_step="Cut it into smaller files and name one of them.",
            )
        values = _within_limits(table.iter_batches(64, columns=needed), name)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name} is not a complete Parquet file ({brief(error)})", next_step="Write or download it again."
        ) from error
    return {"train": _some(_numbered(values, name), name)}, []


def _within_limits(batches: Iterable[Any], name: str) -> list[Any]:
    """Returns the rows of a table, and limits their size: a text that is in the file once may be in a million rows."""
    values: list[Any] = []
    size = 0
    for batch in batches:
        values += _rows_of(batch, name, len(values))
        size += sum(len(text) for row in values[-batch.num_rows :] for text in row.values() if isinstance(text, str))
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"{name} unfolds to more than can be held in memory",
                expected=f"{size_text(MAX_FILE_BYTES)} of values at most",
                next_step="Cut it into smaller files and name one of them.",
            )
    return values


def _rows_of(batch: Any, name: str, before: int) -> list[Any]:
    """Returns a batch's rows; a text that is far too long is refused before it is unfolded."""
    import pyarrow
    import pyarrow.compute

    for column in batch.columns:
        texts = column.dictionary if pyarrow.types.is_dictionary(column.type) else column
        kind = texts.type
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            longest = pyarrow.compute.max(pyarrow.compute.binary_length(texts)).as_py()
            if longest is not None and longest > MAX_LINE_BYTES:
                raise DataError(
                    f"{name} has a text that is too long, in row {before + 1} or soon after",
                    expected=f"{size_text(MAX_LINE_BYTES)} at most",
                    got=size_text(longest),
                    next_step="Check that it is one dialogue, and remove it if not.",
                )
    return batch.to_pylist()


_TEXT_READERS: dict[str, Callable[[BinaryIO, str], Rows]] = {
    ".json": read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}
FILE_SUFFIXES = (*_TEXT_READERS, ".parquet")


def needed_columns(found: Collection[str], columns: Collection[str]) -> list[str]:
    """The columns of a table to read: those asked for, their numbered siblings and `id`; none where one asked for is missing."""
    if not set(columns) <= set(found):
        return []
    more = {sibling for column in columns for sibling in numbered_siblings(column, found)}
    return [column for column in found if column in columns or column in more or column == "id"]


def header_only(found: Collection[str], name: str) -> list[Row]:
    """One row without values, which says which columns a table has without reading it."""
    return [Row(f"{name} row 1", dict.fromkeys(found))]


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Yields numbered lines with their line ends. Only b'\\n' ends a line: a text may hold U+2028 and the like."""
    number = offset = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{name} line {number} is too long",
                expected=f"{size_text(MAX_LINE_BYTES)} at most",
                next_step="Check that each row is on a line of its own.",
            )
        yield number, _decoded(line, name, number, offset)
        offset += len(line)


def _decoded(data: bytes, name: str, line: int, offset: int) -> str:
    """Decodes UTF-8 `data`, which starts at `line` and at byte `offset` of the file; a byte order mark is dropped."""
    if offset == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name} line 1 is UTF-16", expected="UTF-8", next_step=_AS_UTF8)
    nul = data.find(b"\0")
    if nul >= 0:
        raise DataError(
            f"{name} line {line + data.count(bytes([10]), 0, nul)} holds a NUL byte (byte {offset + nul})",
            expected="text in UTF-8",
            next_step=_AS_UTF8,
        )
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        at = error.start + (3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0)
        raise DataError(
            f"{name} line {line + data.count(bytes([10]), 0, at)} is not UTF-8 (byte 0x{data[at]:02x} at {offset + at})",
            expected="text in UTF-8",
            next_step=_AS_UTF8,
        ) from error


def _parsed(text: str, name: str, line: int | None, expected: str) -> Any:
    """Parses JSON text: a line of the file, or all of it where `line` is None."""
    place = name if line is None else f"{name} line {line}"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        many = line is None and error.msg == "Extra data"
        raise DataError(
            f"{name} line {line or error.lineno} is not valid JSON ({error.msg}, column {error.colno})",
            expected=expected,
            next_step="If each line is an object of its own, call the file .jsonl." if many else "Fix that line.",
        ) from error
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply", expected=expected, next_step="Flatten the objects.") from error
    except ValueError as error:  # a whole number of more than 4300 digits
        raise DataError(f"{place} can't be read ({brief(error)})", next_step="Fix that value.") from error


def _numbered(values: list[Any], name: str) -> list[Row]:
    for number, value in enumerate(values, start=1):
        texts = value.values() if isinstance(value, dict) else ()
        if any(isinstance(text, str) and len(text) > MAX_LINE_BYTES for text in texts):
            raise DataError(
                f"{name} row {number} is too long",
                expected=f"{size_text(MAX_LINE_BYTES)} at most",
                next_step="Check that it is one dialogue, and remove it if not.",
            )
    return [Row(f"{name} row {number}", value) for number, value in enumerate(values, start=1)]


def _some(rows: list[Row], name: str) -> list[Row]:
    if not rows:
        raise DataError(f"{name} holds no rows", next_step="Check that it was written or copied whole.")
    return rows
