"""Reads `progress.jsonl` as it grows, as one curve without gaps: steps that a later session repeated are dropped.

Each read parses what was appended since the last one, so that a viewer costs as much at step 100,000 as at step 10. The file may
come from anywhere: a line without a step is skipped, and a value that is not of its kind is dropped from its line.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.folders import open_regular
from qlora_helpers.base.records import LARGEST_WHOLE

NUMBERS = frozenset(
    {"time", "session", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_s", "seconds", "usd"}
    | {"evaluations_without_better"}
)
"""The values of a line that have to be finite numbers."""
LARGEST_NUMBER = 1e300  # a chart has to scale it


class Progress:
    """A reader of a progress file; several may read the same file.

    Args:
        path: the file, which need not exist yet.

    Attributes:
        records: the logged steps as far as they were read, without superseded ones.
        events: what else happened, as `(kind, step)` in the order of the file and without superseded ones: a session `resumed`
            from a step, or a checkpoint was `saved`.
        generation: increases when records were superseded or the file was replaced, so that points drawn before may be invalid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.events: list[tuple[str, int]] = []
        self.generation = 0
        self._offset = 0
        self._file: tuple[int, int] | None = None

    def read(self, *, to_end: bool = False) -> list[dict[str, Any]]:
        """Reads what was appended since the last call and returns the new records.

        Args:
            to_end: whether to read a last line that has no line end yet; for a reader that reads only once.

        Raises:
            RunError: it is a link or something else that is no regular file, or may not be read.
        """
        try:
            with open_regular(self.path, follow=False) as file:
                found = os.fstat(file.fileno())
                if self._file != (found.st_dev, found.st_ino) or found.st_size < self._offset:
                    self._restart((found.st_dev, found.st_ino))
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(
                f"{self.path} can't be read ({error.strerror or error})",
                next_step="Check what it is and who owns it.",
            ) from error
        whole = len(text) if to_end else text.rfind(b"\n") + 1
        self._offset += whole
        lines = [record for record in map(_parsed, text[:whole].splitlines()) if record is not None]
        # From the end: a step counts if no session that began after it begins before it. A file with a start on every second
        # line is so read in one pass, too.
        new: list[dict[str, Any]] = []
        events: list[tuple[str, int]] = []
        first = math.inf
        superseded = False
        for record in reversed(lines):
            if record.get("event") == "start":
                resumed_from = record.get("resumed_from", 0)
                if type(resumed_from) is int and resumed_from <= LARGEST_WHOLE:
                    events += [("resumed", resumed_from)] if 0 < resumed_from <= first else []
                    first = min(first, resumed_from)
            elif type(record.get("step")) is int and abs(record["step"]) <= LARGEST_WHOLE:
                if record["step"] <= first:
                    if record.get("event") == "saved":
                        events.append(("saved", record["step"]))
                    else:
                        new.append(record)
                else:
                    superseded = True
        new.reverse()
        self._supersede(first, superseded)
        self.records += new
        self.events += reversed(events)
        return new

    def _restart(self, file: tuple[int, int]) -> None:
        if self.records:
            self.generation += 1
        self.records, self.events, self._offset, self._file = [], [], 0, file

    def _supersede(self, step: float, superseded: bool) -> None:
        kept = self.records if step == math.inf else [old for old in self.records if old["step"] <= step]
        self.generation += superseded or len(kept) < len(self.records)
        self.records = kept
        self.events = [event for event in self.events if event[1] <= step]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    invalid = [key for key, value in record.items() if key in NUMBERS and not _is_number(value)]
    for key in invalid:
        del record[key]
    return record


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST_NUMBER <= value <= LARGEST_NUMBER  # not a number compares as False
