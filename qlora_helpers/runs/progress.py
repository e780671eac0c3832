"""`progress.jsonl` as one gapless curve, read as it grows: what a resumed session did again is dropped, half-written lines wait.

Each look parses what was appended since the last one, so that a viewer costs as much at step 100,000 as at step 10.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MOST_STEPS = 2**53  # what a chart can hold: the file may come from anywhere


class Progress:
    """A reader of a progress file; several may read the same one.

    Args:
        path: of the file; need not exist yet.

    Attributes:
        records: the logged steps as far as they were read, superseded ones left out.
        generation: goes up when a record was taken back or the file began anew: points that were drawn before may be gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.generation = 0
        self._offset = 0
        self._file: tuple[int, int] | None = None

    def read(self, *, to_end: bool = False) -> list[dict[str, Any]]:
        """Reads what was appended and returns the records that are new.

        Args:
            to_end: takes a last line without a line end too, where it is whole; for a reader that looks only once.
        """
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if self._file != (found.st_dev, found.st_ino) or found.st_size < self._offset:
                    self._begin_anew((found.st_dev, found.st_ino))
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = len(text) if to_end else text.rfind(b"\n") + 1
        self._offset += whole
        new: list[dict[str, Any]] = []
        for line in text[:whole].splitlines():
            record = _parsed(line)
            if record is None:
                continue
            if record.get("event") == "start":
                resumed_from = record.get("resumed_from", 0)
                if type(resumed_from) is int:
                    self._take_back(resumed_from)
                    new = [old for old in new if old["step"] <= resumed_from]
            elif type(record.get("step")) is int and abs(record["step"]) <= MOST_STEPS:
                self.records.append(record)
                new.append(record)
        return new

    def _begin_anew(self, file: tuple[int, int]) -> None:
        if self.records:
            self.generation += 1
        self.records, self._offset, self._file = [], 0, file

    def _take_back(self, step: int) -> None:
        kept = [old for old in self.records if old["step"] <= step]
        if len(kept) < len(self.records):
            self.generation += 1
        self.records = kept


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
