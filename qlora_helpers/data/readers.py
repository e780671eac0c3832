"""Reads rows from data files, each with its place in the file; JSON and JSON Lines here, other kinds in modules of their own.

Owns which suffix is read how. Knows nothing of what the columns mean: that is decided in `forms` and `conversion`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import brief, size_text
from qlora_helpers.data import encodings
from qlora_helpers.data.compressed import data_suffix, opened
from qlora_helpers.data.csv_files import csv_rows
from qlora_helpers.data.encodings import encoding_of, numbered_lines, whole_text
from qlora_helpers.data.excel import excel_part
from qlora_helpers.data.file_signs import refuse_other_content
from qlora_helpers.data.rows import Part, Row, listed
from qlora_helpers.data.splits import SPLIT_NAMES, named_splits
from qlora_helpers.data.tables import arrow_part, parquet_part
from qlora_helpers.data.text_files import text_rows
from qlora_helpers.data.texts import KeyTwiceError, each_key_once

_JSON_FORMS = "a list of objects, or an object with the lists train, val and test, or data"
_BLANK = re.compile(r"[ \t\n\r]*")
Parts = dict[str, list[Part]]  # by split (see `Source.splits`)


def read_file(path: Path, name: str, config: DataConfig, notes: list[str]) -> Parts:
    """Opens a data file.

    Args:
        path: the file; its suffix says which kind it is.
        name: its name, for messages.
        config: encoding, separator, sheet.
        notes: gets lines on how it is read, some of them only while its rows are.

    Returns:
        Its rows by split (only `train` where the file has no splits), which are read when they are asked for.

    Raises:
        DataError: the file is empty, too large, damaged or of another kind; the message names the line where there is one.
            Reading the rows raises it too.
    """
    suffix = data_suffix(path)
    with opened(path) as file:
        refuse_other_content(file, name, suffix)
        if suffix == ".json":
            encoding = encoding_of(file, name, config.encoding, notes, guess=False)
            return _json_parts(path, file, name, encoding, notes)
        if suffix in _TABLES:
            return {"train": [_TABLES[suffix](path, file, name, config, notes)]}
        if suffix in (".jsonl", ".ndjson"):
            encoding = encoding_of(file, name, config.encoding, notes, guess=False)
            return {"train": [Part(name, lambda columns: _jsonl_rows(path, name, encoding))]}
        encoding = encoding_of(file, name, config.encoding, notes, guess=True)
        if suffix in TEXT_SUFFIXES:
            size = file.seek(0, io.SEEK_END)
            return {"train": [Part(name, lambda columns: text_rows(path, name, encoding, size, notes))]}
        tabs = suffix == ".tsv"
    return {"train": [Part(name, lambda columns: csv_rows(path, name, encoding, config, notes, tabs=tabs))]}


_TABLES: dict[str, Callable[[Path, BinaryIO, str, DataConfig, list[str]], Part]] = {
    ".parquet": parquet_part,
    ".arrow": arrow_part,
    ".feather": arrow_part,
    ".xlsx": excel_part,
}
TEXT_SUFFIXES = (".txt", ".md")
FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", *_TABLES, *TEXT_SUFFIXES)


def is_data_file(name: str) -> bool:
    """Whether a file's name ends as those that are read do."""
    return data_suffix(Path(name)) in FILE_SUFFIXES


def _json_parts(path: Path, file: BinaryIO, name: str, encoding: str, notes: list[str]) -> Parts:
    start = file.read(4096).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")
    file.seek(0)
    if start.startswith(b"["):  # a list is read element by element: only its text and its examples are held
        return {"train": [Part(name, lambda columns: _json_rows(path, name, encoding))]}
    return json_parts(whole_text(file, name, encoding), name, notes)


def json_parts(text: str, name: str, notes: list[str]) -> Parts:
    """Returns the rows of JSON: of `[...]`, `{"train": [...], "val": [...], "test": [...]}`, `{"data": [...]}` or pandas' tables.

    Raises:
        DataError: it is not JSON, or JSON of another form.
    """
    value = _values(text, name)
    if isinstance(value, dict):
        value = _from_pandas(value)
    if isinstance(value, dict):
        parts = {key: rows for key, rows in value.items() if key.lower() in SPLIT_NAMES or isinstance(rows, list)}
        wrong = [key for key, rows in parts.items() if not isinstance(rows, list)]
        if any(key.lower() in SPLIT_NAMES for key in parts) and not wrong:
            notes += [
                f"{name}: skipped {listed([key])}, which is not a list of rows" for key in value if key not in parts
            ]
            named = {key: [_listed_part(rows, f"{name} {key}")] for key, rows in parts.items()}
            splits, more = named_splits(name, named)
            notes += more
            return splits
        if "data" in parts and not wrong:
            return {"train": [_listed_part(parts["data"], name)]}
        found = f"an object with {listed(value)}" if not wrong else f"{listed(wrong)} without a list"
    elif isinstance(value, list):
        if value:
            return {"train": [_listed_part(value, name)]}
        found = "an empty list"
    else:
        found = f"a single {type(value).__name__}"
    raise DataError(
        f"{name} holds no rows", expected=_JSON_FORMS, got=found, next_step="Bring it into one of these forms."
    )


def _values(text: str, name: str) -> Any:
    """Returns the value of a JSON text; a list of them where several objects stand one after another."""
    try:
        return json.loads(text, object_pairs_hook=each_key_once)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or not text.lstrip().startswith("{"):
            raise _not_json(error, name, None, _JSON_FORMS) from error
    except (ValueError, RecursionError) as error:
        raise _not_json(error, name, None, _JSON_FORMS) from error
    decode, found, place = json.JSONDecoder(object_pairs_hook=each_key_once).raw_decode, [], 0
    while (place := _BLANK.match(text, place).end()) < len(text):  # type: ignore[union-attr]
        try:
            value, place = decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _not_json(error, name, None, "objects one after another, or a list of them") from error
        found.append(value)
    return found


def _from_pandas(value: dict[str, Any]) -> Any:
    """Returns the rows of a table as pandas' `to_json` writes it, column by column, row by row or split; else the value."""
    if set(value) >= {"columns", "data"} and isinstance(value["columns"], list) and isinstance(value["data"], list):
        names = value["columns"]
        if all(isinstance(row, list) and len(row) == len(names) for row in value["data"]):
            return [dict(zip(map(str, names), row, strict=True)) for row in value["data"]]
    tables = list(value.values())
    if _is_by_column(value):
        return [dict(zip(value, row, strict=True)) for row in zip(*tables, strict=True)]
    if not tables or not all(isinstance(table, dict) and table for table in tables):
        return value
    if all(key.isdecimal() for key in value):
        return tables
    if all(table.keys() == tables[0].keys() for table in tables) and all(key.isdecimal() for key in tables[0]):
        return [{column: table[key] for column, table in value.items()} for key in tables[0]]
    return value


def _is_by_column(value: dict[str, Any]) -> bool:
    """Whether an object holds each column's values as a list, as pandas' `to_dict("list")` and datasets' `to_dict` give them."""
    lists = list(value.values())
    if (
        len(lists) < 2
        or "data" in value
        or not all(isinstance(each, list) and each for each in lists)
        or SPLIT_NAMES.keys() & value.keys()
    ):
        return False
    return len({len(each) for each in lists}) == 1 and not any(isinstance(item, dict) for item in lists[0])


def _listed_part(values: list[Any], name: str) -> Part:
    return Part(name, lambda columns: _numbered(iter(values), name))


def _json_rows(path: Path, name: str, encoding: str) -> Iterator[Row]:
    with opened(path) as file:
        text = whole_text(file, name, encoding)
    yield from _numbered(_elements(text, name), name)


def _elements(text: str, name: str) -> Iterator[Any]:
    """Yields the elements of a JSON list one by one.

    Raises:
        DataError: it is not a JSON list, or an empty one; the message names the line.
    """
    decode = json.JSONDecoder(object_pairs_hook=each_key_once).raw_decode
    place = _BLANK.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    if text[place : place + 1] == "]" and not text[place + 1 :].strip():
        raise DataError(
            f"{name} holds no rows",
            expected=_JSON_FORMS,
            got="an empty list",
            next_step="Bring it into one of these forms.",
        )
    while True:
        try:
            value, place = decode(text, place)
            yield value
            place = _BLANK.match(text, place).end()  # type: ignore[union-attr]
            mark = text[place : place + 1]
            if mark == "]":
                rest = _BLANK.match(text, place + 1).end()  # type: ignore[union-attr]
                if rest < len(text):
                    raise json.JSONDecodeError("Extra data", text, rest)
                return
            if mark != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = _BLANK.match(text, place + 1).end()  # type: ignore[union-attr]
        except (ValueError, RecursionError) as error:
            raise _not_json(error, name, None, _JSON_FORMS) from error


def _jsonl_rows(path: Path, name: str, encoding: str) -> Iterator[Row]:
    hint = "a JSON object on each line (a list or objects over several lines belong into a .json file)"
    empty = True
    with opened(path) as file:
        for number, line in numbered_lines(file, name, encoding):
            if line.strip():
                empty = False
                yield Row(f"{name} line {number}", _parsed(line.rstrip("\r\n"), name, number, hint))
    if empty:
        raise DataError(f"{name} holds no rows", next_step="Check that it was written or copied whole.")


def _parsed(text: str, name: str, line: int, expected: str) -> Any:
    """Parses a line of JSON text."""
    try:
        return json.loads(text, object_pairs_hook=each_key_once)
    except (ValueError, RecursionError) as error:
        raise _not_json(error, name, line, expected) from error


def _not_json(error: ValueError | RecursionError, name: str, line: int | None, expected: str) -> DataError:
    place = name if line is None else f"{name} line {line}"
    if isinstance(error, json.JSONDecodeError):
        return DataError(
            f"{name} line {line or error.lineno} is not valid JSON ({error.msg}, column {error.colno})",
            expected=expected,
            next_step="Fix that line.",
        )
    if isinstance(error, KeyTwiceError):
        return DataError(
            f"{place} has an object with the key {str(error)!r} twice",
            expected="each key once",
            next_step="Remove one of them.",
        )
    if isinstance(error, RecursionError):
        return DataError(f"{place} is nested too deeply", expected=expected, next_step="Flatten the objects.")
    return DataError(
        f"{place} can't be read ({brief(error)})", next_step="Fix that value."
    )  # a number of over 4300 digits


def _numbered(values: Iterator[Any], name: str) -> Iterator[Row]:
    for number, value in enumerate(values, start=1):
        texts = value.values() if isinstance(value, dict) else ()
        if any(isinstance(text, str) and len(text) > encodings.MAX_LINE_BYTES for text in texts):
            raise DataError(
                f"{name} row {number} is too long",
                expected=f"{size_text(encodings.MAX_LINE_BYTES)} at most",
                next_step="Check that it is one row, and remove it if not.",
            )
        yield Row(f"{name} row {number}", value)
