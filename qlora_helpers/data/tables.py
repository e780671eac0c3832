"""Reads rows from Parquet and Arrow files and hub tables, and limits what they unfold to before it is taken.

A file of kilobytes may hold a text once and show it in a million rows, or a list of a hundred million zeros: rows, values and bytes
are counted on the file's own figures and on Arrow's arrays, before Python objects are made of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import brief, size_text
from qlora_helpers.data import compressed, encodings
from qlora_helpers.data.arrow_messages import unpacked_bytes
from qlora_helpers.data.compressed import opened
from qlora_helpers.data.parquet_pages import unpacked_page_bytes
from qlora_helpers.data.rows import MAX_ROWS, Part, Row, listed

BATCH_ROWS = 64
MAX_VALUES = 64_000_000  # of all columns and lists together
VALUE_BYTES = 40  # of a number, or of a list's or text's object, in Python
_FILE_MARK = b"ARROW1"
_DIVIDE = "Cut it into smaller files and name one of them."


def parquet_part(path: Path, file: BinaryIO, name: str, config: DataConfig, notes: list[str]) -> Part:
    """Opens a Parquet file; see `readers.read_file`.

    Raises:
        DataError: it is not a complete Parquet file, or holds more rows, values or bytes than the limits.
    """
    import pyarrow.parquet

    with _complete(name, "Parquet"):
        opened_file = pyarrow.parquet.ParquetFile(file)
        schema, metadata = opened_file.schema_arrow, opened_file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        values = sum(group.column(n).num_values for group in groups for n in range(group.num_columns))
        names, kinds = list(schema.names), unusable_columns(schema)
        flat = {column for column, kind in zip(names, schema.types, strict=True) if _is_text(kind)}
    limit(name, rows=metadata.num_rows, values=values, size=size)
    with _complete(name, "Parquet"):
        size = unpacked_page_bytes(file, metadata, compressed.MAX_FILE_BYTES)
    limit(name, size=size)

    def rows(columns: Collection[str] | None) -> Iterator[Row]:
        needed = needed_columns(names, columns, kinds)
        with opened(path) as again, _complete(name, "Parquet"):
            once = [column for column in needed if column in flat]  # a repeated text is kept once
            table = pyarrow.parquet.ParquetFile(again, read_dictionary=once)
            yield from table_rows(table.iter_batches(BATCH_ROWS, columns=needed), names, name)

    return Part(name, rows, kinds)


def arrow_part(path: Path, file: BinaryIO, name: str, config: DataConfig, notes: list[str]) -> Part:
    """Opens an Arrow or Feather file, of the file or the stream format; see `readers.read_file`.

    Raises:
        DataError: it is not a complete Arrow file, or a batch of it unpacks to more than the limit.
    """
    import pyarrow

    with _complete(name, "Arrow"):
        size = unpacked_bytes(_stream_of(file))
        schema = pyarrow.ipc.open_stream(_stream_of(file)).schema
        names, kinds = list(schema.names), unusable_columns(schema)
    limit(name, size=size)

    def rows(columns: Collection[str] | None) -> Iterator[Row]:
        needed = needed_columns(names, columns, kinds)
        with opened(path) as again, _complete(name, "Arrow"):
            batches = pyarrow.ipc.open_stream(_stream_of(again))
            pieces = (piece for batch in batches for piece in _pieces(_valid(batch.select(needed))))
            yield from table_rows(pieces, names, name)

    return Part(name, rows, kinds)


def _stream_of(file: BinaryIO) -> BinaryIO:
    """Goes to where the stream of messages begins: a file of the file format has one, between its mark and its table of contents.

    It is read as a stream, so that what is read are the messages that were counted.
    """
    file.seek(0)
    file.seek(8 if file.read(len(_FILE_MARK)) == _FILE_MARK else 0)
    return file


def _valid(batch: Any) -> Any:
    """Returns a batch whose offsets stay within its bytes: Arrow reads them as they are, and would follow them anywhere."""
    batch.validate(full=True)
    return batch


def _pieces(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(start, BATCH_ROWS)


def needed_columns(names: list[str], columns: Collection[str] | None, kinds: dict[str, str]) -> list[str]:
    """Returns the columns to read: those asked for that can hold texts, all of them where `columns` is None."""
    return [column for column in names if column not in kinds and (columns is None or column in columns)]


def unusable_columns(schema: Any) -> dict[str, str]:
    """Returns the columns of an Arrow schema that can hold no text, and what they hold instead."""
    import pyarrow.types as kinds

    def is_usable(kind: Any) -> bool:
        if kinds.is_dictionary(kind):
            return is_usable(kind.value_type)
        if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
            return is_usable(kind.value_type)
        if kinds.is_struct(kind):
            return all(is_usable(kind.field(number).type) for number in range(kind.num_fields))
        texts = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
        plain = (kinds.is_integer, kinds.is_floating, kinds.is_boolean, kinds.is_null, kinds.is_decimal)
        return any(test(kind) for test in (*texts, *plain)) and getattr(kind, "extension_name", None) is None

    return {name: str(kind)[:60] for name, kind in zip(schema.names, schema.types, strict=True) if not is_usable(kind)}


def table_rows(batches: Iterable[Any], names: Collection[str], name: str, before: int = 0) -> Iterator[Row]:
    """Yields the rows of Arrow batches, and limits how many there are and what they unfold to.

    Args:
        batches: record batches of a few rows each.
        names: all columns of the table; a table without rows gives one row without values.
        name: of the table, for messages.
        before: rows of it that came before.

    Raises:
        DataError: they are too many or too large; the message names the place.
    """
    import pyarrow

    number, size = before, 0
    for batch in batches:
        size += sum(_unfolded(column, name, number) for column in batch.columns)
        limit(name, rows=number + batch.num_rows, size=size, unfolds=True)
        nested = any(pyarrow.types.is_nested(column.type) for column in batch.columns)
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{name} row {number}", _without_nulls(values) if nested else values)
    if number == 0:
        raise DataError(
            f"{name} holds no rows", got=f"the columns {listed(names)}", next_step="Check how it was written."
        )


def _unfolded(array: Any, name: str, before: int) -> int:
    """Returns the bytes that an array takes in Python, counted without making the objects; refuses a text that is far too long."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.types as kinds

    kind = array.type
    if kinds.is_dictionary(kind):
        if kinds.is_nested(kind.value_type):
            return len(array) * max(1, _unfolded(array.dictionary, name, before))
        if not hasattr(array.dictionary, "type") or not _is_text(kind.value_type):
            return VALUE_BYTES * len(array)
        lengths = pyarrow.compute.binary_length(array.dictionary)
        used = lengths.take(array.indices)
        return _sized(used, len(array), name, before)
    if kinds.is_string_view(kind):
        array = array.cast(pyarrow.large_string())  # its lengths can't be counted as they are
    if _is_text(kind):
        return _sized(pyarrow.compute.binary_length(array), len(array), name, before)
    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        return VALUE_BYTES * len(array) + _unfolded(array.flatten(), name, before)
    if kinds.is_struct(kind):
        fields = array.flatten()
        return VALUE_BYTES * len(array) + sum(_unfolded(part, name, before) for part in fields)
    return VALUE_BYTES * len(array)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _sized(lengths: Any, count: int, name: str, before: int) -> int:
    import pyarrow.compute

    longest = pyarrow.compute.max(lengths).as_py() or 0
    if longest > encodings.MAX_LINE_BYTES:
        raise DataError(
            f"{name} has a text that is too long, in row {before + 1} or soon after",
            expected=f"{size_text(encodings.MAX_LINE_BYTES)} at most",
            got=size_text(longest),
            next_step="Check that it is one row, and remove it if not.",
        )
    return VALUE_BYTES * count + (pyarrow.compute.sum(lengths).as_py() or 0)


def _without_nulls(value: Any) -> Any:
    """Drops names within a row's objects whose value is null: a table gives each object of a column the names of all of them."""
    if isinstance(value, dict):
        return {key: _inner(item) for key, item in value.items()}
    return value


def _inner(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _inner(item) for key, item in value.items() if item is not None}
    return [_inner(item) for item in value] if isinstance(value, list) else value


def limit(name: str, *, rows: int = 0, values: int = 0, size: int = 0, unfolds: bool = False) -> None:
    """Refuses a table that is too large: by its rows, its values, or its bytes (`unfolds`: of those that were read so far).

    Raises:
        DataError: it is.
    """
    for found, most, what in ((rows, MAX_ROWS, "rows"), (values, MAX_VALUES, "values")):
        if found > most:
            raise DataError(
                f"{name} has too many {what}", expected=f"{most:,} at most", got=f"{found:,}", next_step=_DIVIDE
            )
    if size > compressed.MAX_FILE_BYTES:
        raise DataError(
            f"{name} unfolds to more than can be held in memory"
            if unfolds
            else f"{name} is too large to be held in memory",
            expected=f"{size_text(compressed.MAX_FILE_BYTES)} of values at most",
            got="" if unfolds else size_text(size),
            next_step=_DIVIDE,
        )


class _complete:
    """Turns what pyarrow raises on damaged bytes into one error."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow

        if isinstance(error, DataError) or error is None:
            return
        if isinstance(error, pyarrow.ArrowException | OSError | ValueError | OverflowError | MemoryError):
            raise DataError(
                f"{self.name} is not a complete {self.kind} file ({brief(error)})",
                next_step="Write or download it again.",
            ) from error
