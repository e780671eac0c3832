"""Keeps many rows without holding them in memory: a few in a list, more in a file without a name that ends with the process.

Knows nothing of what a row is. The file is written and read by this process alone, so its rows are pickled.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

CHARACTERS_IN_MEMORY = 64_000_000  # of a spool's rows; more are in a file
_WRITTEN_AT_ONCE = 4_000_000  # bytes

T = TypeVar("T")


class Spool(Generic[T]):
    """Takes rows one by one and gives them back by their number."""

    def __init__(self) -> None:
        self._held: list[T] = []
        self._characters = 0
        self._file: Any = None
        self._starts = array("q", [0])
        self._waiting = bytearray()

    def __len__(self) -> int:
        return len(self._held) if self._file is None else len(self._starts) - 1

    @property
    def in_memory(self) -> bool:
        """Whether the rows are few enough to be held."""
        return self._file is None

    def add(self, row: T, characters: int) -> int:
        """Takes a row and returns its number.

        Args:
            row: anything that can be pickled.
            characters: about how large it is.
        """
        self._characters += characters
        if self._file is not None:
            self._put(row)
        else:
            self._held.append(row)
            if self._characters > CHARACTERS_IN_MEMORY:
                self._file = tempfile.TemporaryFile(prefix="qlora-rows-")  # noqa: SIM115 - open while there is a spool
                for each in self._held:
                    self._put(each)
                self._held = []
        return len(self) - 1

    def _put(self, row: T) -> None:
        self._waiting += pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
        self._starts.append(self._written + len(self._waiting))
        if len(self._waiting) >= _WRITTEN_AT_ONCE:
            self._flush()

    @property
    def _written(self) -> int:
        return self._file.tell()

    def _flush(self) -> None:
        self._file.write(self._waiting)
        self._file.flush()
        self._waiting = bytearray()

    def __getitem__(self, number: int) -> T:
        if self._file is None:
            return self._held[number]
        if self._waiting:
            self._flush()
        start, end = self._starts[number], self._starts[number + 1]
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))


class SpooledRows(Sequence[T]):
    """Some rows of a spool in an order of their own; each is read when it is asked for, and none is held.

    Args:
        spool: holds them.
        numbers: of the rows, `(rows,)`.
    """

    def __init__(self, spool: Spool[T], numbers: Sequence[int] | np.ndarray) -> None:
        self._spool, self._numbers = spool, np.asarray(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> SpooledRows[T]: ...
    def __getitem__(self, place: int | slice) -> T | SpooledRows[T]:
        if isinstance(place, slice):
            return SpooledRows(self._spool, self._numbers[place])
        return self._spool[int(self._numbers[place])]

    def __iter__(self) -> Iterator[T]:
        return (self._spool[number] for number in self._numbers.tolist())


class SpooledByName(Mapping[str, T]):
    """Rows of a spool by the names they were given.

    Args:
        spool: takes the rows, and holds them.
    """

    def __init__(self, spool: Spool[T]) -> None:
        self._spool, self._numbers = spool, dict[str, int]()

    def add(self, name: str, row: T, characters: int) -> None:
        """Takes a row; one that had the name before is forgotten."""
        self._numbers[name] = self._spool.add(row, characters)

    def __getitem__(self, name: str) -> T:
        return self._spool[self._numbers[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def rows_of(spool: Spool[T], numbers: Sequence[int]) -> Sequence[T]:
    """Returns rows of a spool: a tuple where they are in memory, else a sequence that reads them."""
    return tuple(spool[number] for number in numbers) if spool.in_memory else SpooledRows(spool, numbers)
