"""The runs of a folder side by side: what was changed in each, how well it did, what it cost, and its state.

Sorts and filters the rows that `run_row` reads. Knows no widgets and no model, and imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.text import plain, size_text
from qlora_helpers.base.units import duration
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import existing_run, run_at, runs_root
from qlora_helpers.runs.space import is_sweep
from qlora_helpers.runs.sweep_file import SWEEP, read_sweep
from qlora_helpers.views.run_row import COLUMNS, NUMBERS, RunRow, read_row, value_text

RUN_FILES = ("config.json", "status.json", "progress.jsonl", SWEEP)
"""A folder with one of these is, or was, a run or a sweep."""

_KEYS: dict[str, Callable[[RunRow], Any]] = {
    "run": lambda row: row.name,
    "state": lambda row: row.state,
    "changed settings": lambda row: row.changes or None,
    "data": lambda row: row.data or None,
    "best loss": lambda row: row.best_loss,
    "score": lambda row: row.score.value if row.score and not row.random_weights else None,
    "minutes": lambda row: row.status.used_s or None,
    "USD": lambda row: row.status.used_usd,
    "size": lambda row: row.n_bytes,
    "date": lambda row: row.date or None,
}


@dataclass(frozen=True, repr=False)
class RunList(Tabular):
    """Runs as rows; shows as a table.

    Attributes:
        rows: the runs that are shown.
        hidden: how many a filter left out.
    """

    rows: tuple[RunRow, ...]
    hidden: int = 0

    def __iter__(self) -> Iterator[RunRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def sorted_by(self, column: str = "run", *, descending: bool | None = None) -> RunList:
        """Returns the list in the order of a column; rows without a value come last.

        Args:
            column: one of `COLUMNS`, or how one begins.
            descending: the largest first; None takes the direction that puts what people look for first: the highest score, the
                newest date, the largest size, and the lowest of everything else.

        Raises:
            UserError: there is no such column.
        """
        full = next((name for name in COLUMNS if name.lower().startswith(column.strip().lower() or "?")), None)
        if full is None:
            raise UserError("no column has that name", expected=", ".join(COLUMNS), got=plain(column))
        down = full in ("score", "date", "size") if descending is None else descending
        key = _KEYS[full]
        known = sorted((row for row in self.rows if key(row) is not None), key=key, reverse=down)
        return dataclasses.replace(self, rows=(*known, *(row for row in self.rows if key(row) is None)))

    def reversed(self) -> RunList:
        """Returns the list the other way round."""
        return dataclasses.replace(self, rows=self.rows[::-1])

    def where(self, text: str) -> RunList:
        """Returns the runs that have every word of a text in one of their cells; `setting=value` also finds unchanged settings."""
        words = text.lower().split()
        kept = tuple(row for row in self.rows if all(_has(row, word) for word in words))
        return RunList(kept, self.hidden + len(self.rows) - len(kept))

    def table(self) -> Table:
        """Returns a row for each run."""
        note = [f"{self.hidden} runs are left out by the filter"] if self.hidden else []
        if not self.rows:
            return Table((), (), caption="no runs yet" if not self.hidden else "no run fits the filter", notes=note)
        return Table(COLUMNS, [row.cells() for row in self.rows], numbers=NUMBERS, notes=note)


def _has(row: RunRow, word: str) -> bool:
    if any(word in cell.lower() for cell in row.cells()):
        return True
    name, equals, value = word.partition("=")
    if not equals or row.config is None:
        return False
    settings = {
        f"{section}.{key}": item
        for section, values in row.config.to_dict().items()
        if isinstance(values, dict)
        for key, item in values.items()
    }
    return any(
        value_text(item).lower() == value for full, item in settings.items() if name in (full, full.partition(".")[2])
    )


def read_runs(root: str | os.PathLike[str] | None = None) -> RunList:
    """Reads all runs and sweeps below a folder, in the order of their names.

    Args:
        root: the folder that holds the runs; None takes `$QLORA_RUNS`, else `runs`.
    """
    folder = runs_root(root)
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        found = []
    return RunList(tuple(read_row(path) for path in found if _was_run(path)))


def _was_run(folder: Path) -> bool:
    try:
        return any(os.path.lexists(folder / name) for name in RUN_FILES)
    except OSError:
        return False


def named_runs(
    names: Sequence[str | os.PathLike[str] | Run], *, root: str | os.PathLike[str] | None = None
) -> list[Run]:
    """Opens several runs by their names, paths or themselves, each once; a sweep means those of its runs that exist.

    Raises:
        RunError: one of them does not exist, or its folder holds links.
        UserError: fewer than two.
    """
    found: dict[Path, Run] = {}
    for name in names:
        first = name if isinstance(name, Run) else run_at(name, root)
        members = expanded([first]) if is_sweep(first) else [existing_run(first.folder)]
        for run in members:
            found.setdefault(run.folder.resolve(), run)
    if len(found) < 2:
        raise UserError(
            "a comparison needs two runs or more", got=", ".join(run.name for run in found.values()) or "none"
        )
    return list(found.values())


def expanded(runs: Iterable[Run]) -> list[Run]:
    """Returns runs, with those of its runs that exist in the place of a sweep, each once.

    Raises:
        RunError: a sweep's file is damaged.
    """
    found: dict[str, Run] = {}
    for run in runs:
        members = [member.name for member in read_sweep(run).members] if is_sweep(run) else [run.name]
        each = {name: Run(run.folder.parent / name) for name in members}
        found |= {name: one for name, one in each.items() if not is_sweep(run) or one.exists()}
    return list(found.values())


def total_line(rows: Iterable[RunRow]) -> str:
    """Returns how many runs there are, and what they took together; what a sweep took, its runs took."""
    every = list(rows)
    runs = [row for row in every if row.sweep is None]
    seconds, n_bytes = sum(row.status.used_s for row in runs), sum(row.n_bytes for row in every)
    prices = [row.status.used_usd for row in runs if row.status.used_usd is not None]
    price = f", {sum(prices):.2f} USD" if prices else ""
    sweeps = len(every) - len(runs)
    also = f" and {sweeps} sweep{'s' * (sweeps != 1)}" if sweeps else ""
    return (
        f"{len(runs)} run{'s' * (len(runs) != 1)}{also}, {duration(seconds)} of training{price}, {size_text(n_bytes)}"
    )
