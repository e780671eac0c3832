"""Reads the header of a GGUF file as a stranger's: every count and length is held against the file's size before it is used.

The format: magic, version, numbers of tensors and of values, the values by name, the tensors' names, shapes and places
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Reads no weights and imports no torch.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.shapes.config_file import MOST
from qlora_helpers.model.stored_tensors import StoredTensor

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9
_MOST_DIMENSIONS = 8
_LOOPS = {"block_count": "layers", "expert_count": "experts"}
_SMALLEST_VALUE, _SMALLEST_TENSOR = 13, 24  # bytes that an entry takes at least


def read_gguf_tensors(path: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a GGUF file by name; `dtype` is `GGUF`, as their values are in types of that format's own.

    Raises:
        ModelError: the header is damaged, or names more layers or experts than any model has.
    """
    try:
        with open(path, "rb") as file:
            return dict(_header(_Reader(file)))
    except (struct.error, UnicodeDecodeError, OSError, _Damaged) as error:
        raise ModelError(
            f"{path.name} could not be read as GGUF ({error})", next_step="Download it again, or use another format."
        ) from error


class _Damaged(Exception):
    """What is wrong with a header."""


class _Reader:
    """A file of known size, from which no more is read than it has."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.left = os.fstat(file.fileno()).st_size

    def take(self, size: int) -> bytes:
        self.skip(size, really=False)
        return self.file.read(size)

    def skip(self, size: int, *, really: bool = True) -> None:
        if size > self.left:
            raise _Damaged("its header names more than the file holds")
        self.left -= size
        if really:
            self.file.seek(size, os.SEEK_CUR)

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, smallest: int) -> int:
        """Reads a number of entries, each of which takes so many bytes at least."""
        found = self.scalar("<Q")
        if found * smallest > self.left:
            raise _Damaged("its header names more than the file holds")
        return found

    def text(self) -> str:
        return self.take(self.count(1)).decode("utf-8")


def _header(reader: _Reader) -> Iterator[tuple[str, StoredTensor]]:
    if reader.take(4) != b"GGUF" or reader.scalar("<I") not in (2, 3):
        raise _Damaged("it does not begin as version 2 or 3 of the format")
    tensors, values = reader.count(_SMALLEST_TENSOR), reader.count(_SMALLEST_VALUE)
    for _ in range(values):
        name = reader.text()
        value = _value(reader, reader.scalar("<I"))
        loop = _LOOPS.get(name.rpartition(".")[2])
        if loop and not (type(value) is int and value <= MOST[loop]):
            raise _Damaged(f"{name[:60]} asks for more {loop} than any model has")
        if name == "general.architecture" and not isinstance(value, str):
            raise _Damaged("its architecture is not a name")
    path = Path(reader.file.name)
    # A value takes an eighth of a byte at least, whatever its type; tensors that share their bytes count each.
    left = 8 * os.fstat(reader.file.fileno()).st_size
    for _ in range(tensors):
        name, dimensions = reader.text(), reader.scalar("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise _Damaged(f"{name[:60]} has {dimensions} dimensions")
        shape = tuple(reader.scalar("<Q") for _ in range(dimensions))
        reader.scalar("<I")
        left -= math.prod(shape)
        if left < 0:
            raise _Damaged(f"its tensors up to {name[:60]} are larger than the file")
        yield name, StoredTensor(name, path, "GGUF", shape, reader.scalar("<Q"))


def _value(reader: _Reader, kind: int) -> Any:
    """Reads one value; of a list only that it ends within the file."""
    if kind in _SCALARS:
        return reader.scalar(_SCALARS[kind])
    if kind == _TEXT:
        return reader.text()
    if kind != _LIST:
        raise _Damaged(f"it holds a value of the unknown type {kind}")
    inner = reader.scalar("<I")
    if inner in _SCALARS:
        size = struct.calcsize(_SCALARS[inner])
        reader.skip(size * reader.count(size))
    elif inner == _TEXT:
        for _ in range(reader.count(8)):
            reader.skip(reader.count(1))
    else:
        raise _Damaged("it holds lists of lists")
    return None
