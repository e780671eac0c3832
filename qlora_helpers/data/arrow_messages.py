"""Says how many bytes an Arrow stream unpacks to, before anything of it is unpacked: 100 KB may be a batch of many gigabytes.

A compressed buffer begins with its length when unpacked (https://arrow.apache.org/docs/format/Columnar.html#compression). Arrow
takes that much memory and has no limit of its own. Where the buffers lie is in each message's metadata, a flatbuffer of which
the few fields that are needed are read here (Message.fbs in Arrow's repository).
"""

from __future__ import annotations

import struct
from typing import Any

_DICTIONARY, _BATCH = 2, 3
_OLD_MARK = b"experimental_compression"  # how the first version with compression said so, in a message's own key


def unpacked_bytes(source: Any) -> int:
    """Returns the bytes that the largest batch of a stream takes when it is unpacked, with all dictionaries, which are kept.

    Args:
        source: what `pyarrow.ipc` reads from, at the beginning of a stream.

    Raises:
        pyarrow.ArrowException: it is not a stream of messages.
        ValueError: the metadata of a message is damaged.
    """
    from pyarrow import ipc

    kept = largest = 0
    for message in ipc.MessageReader.open_stream(source):
        if message.body is None or message.metadata is None:
            continue
        try:
            kind, size = _unpacked(memoryview(message.metadata), memoryview(message.body))
        except struct.error as error:
            raise ValueError(f"the metadata of a message is damaged ({error})") from error
        if kind == _DICTIONARY:
            kept += size
        else:
            largest = max(largest, size)
    return kept + largest


def _unpacked(data: memoryview, body: memoryview) -> tuple[int, int]:
    """Returns a message's kind and the bytes that its buffers take when they are unpacked."""
    message = _number(data, "<I", 0)
    kind_at, header_at = _field(data, message, 1), _field(data, message, 2)
    kind = _number(data, "<B", kind_at) if kind_at else 0
    if kind not in (_DICTIONARY, _BATCH) or not header_at:
        return kind, 0
    batch = _followed(data, header_at)
    if kind == _DICTIONARY:
        batch_at = _field(data, batch, 1)
        if not batch_at:
            return kind, 0
        batch = _followed(data, batch_at)
    buffers_at = _field(data, batch, 2)
    is_packed = _field(data, batch, 3) or _OLD_MARK in bytes(data)
    if not buffers_at or not is_packed:
        return kind, len(body)
    buffers = _followed(data, buffers_at)
    size = 0
    for number in range(_number(data, "<I", buffers)):
        start = _number(data, "<q", buffers + 4 + 16 * number)
        length = _number(data, "<q", buffers + 12 + 16 * number)
        unpacked = _number(body, "<q", start) if length > 0 else 0
        size += length if unpacked < 0 else unpacked  # -1: it is not compressed
    return kind, size


def _field(data: memoryview, table: int, number: int) -> int:
    """Returns where a table's field lies; 0 where it has none."""
    index = table - _number(data, "<i", table)
    place = 4 + 2 * number
    offset = _number(data, "<H", index + place) if place < _number(data, "<H", index) else 0
    return table + offset if offset else 0


def _followed(data: memoryview, place: int) -> int:
    return place + _number(data, "<I", place)


def _number(data: memoryview, form: str, place: int) -> int:
    if place < 0:
        raise struct.error("an offset leads out of it")
    return struct.unpack_from(form, data, place)[0]
