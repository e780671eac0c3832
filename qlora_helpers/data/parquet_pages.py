"""Says how many bytes the pages of a Parquet file unpack to, by the pages' own headers: the file's figures on itself may be wrong.

Each page follows its header, a structure in Thrift's compact protocol, whose first fields are its kind and its sizes, unpacked and
packed (https://parquet.apache.org/docs/file-format/data-pages/). A reader takes the memory that this header names.
"""

from __future__ import annotations

from typing import Any, BinaryIO

_UNPACKED, _PACKED = 2, 3
_DEEPEST = 8
_FIXED = {1: 0, 2: 0, 3: 1, 7: 8}  # true, false, byte, double
_NUMBERS = (4, 5, 6)
_BYTES, _LIST, _SET, _STRUCT = 8, 9, 10, 12


def unpacked_page_bytes(file: BinaryIO, metadata: Any, most: int) -> int:
    """Returns the bytes that all pages of a Parquet file unpack to, or a number over `most` as soon as they are more.

    Args:
        file: the file; its position changes.
        metadata: pyarrow's `FileMetaData` of it.
        most: the limit of whoever asks.

    Raises:
        ValueError: a page's header is damaged.
    """
    size = 0
    for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
        for column in (group.column(number) for number in range(group.num_columns)):
            place = column.data_page_offset
            if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < place:
                place = column.dictionary_page_offset
            end = place + column.total_compressed_size
            while 0 <= place < end and size <= most:
                file.seek(place)
                fields = _numbers(file, 0)
                unpacked, packed = fields.get(_UNPACKED, -1), fields.get(_PACKED, -1)
                if unpacked < 0 or packed < 0:
                    raise ValueError("a page does not say how large it is")
                size += unpacked
                place = file.tell() + packed
    return size


def _numbers(file: BinaryIO, depth: int) -> dict[int, int]:
    """Reads a structure to its end and returns its whole numbers by their fields' numbers."""
    if depth > _DEEPEST:
        raise ValueError("the header of a page is nested too deeply")
    found, field = {}, 0
    while head := _byte(file):
        kind, step = head & 15, head >> 4
        field = field + step if step else _signed(file)
        value = _value(file, kind, depth)
        if value is not None:
            found[field] = value
    return found


def _value(file: BinaryIO, kind: int, depth: int) -> int | None:
    if kind in _NUMBERS:
        return _signed(file)
    if kind in _FIXED:
        file.seek(_FIXED[kind], 1)
    elif kind == _BYTES:
        file.seek(_whole(file), 1)
    elif kind == _STRUCT:
        _numbers(file, depth + 1)
    elif kind in (_LIST, _SET):
        head = _byte(file)
        count = head >> 4 if head >> 4 != 15 else _whole(file)
        for _ in range(count):
            _value(file, 3 if head & 15 in (1, 2) else head & 15, depth + 1)
    else:
        raise ValueError("the header of a page holds something unknown")
    return None


def _byte(file: BinaryIO) -> int:
    found = file.read(1)
    if not found:
        raise ValueError("the file ends within a page's header")
    return found[0]


def _whole(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number in a page's header does not end")


def _signed(file: BinaryIO) -> int:
    value = _whole(file)
    return (value >> 1) ^ -(value & 1)
