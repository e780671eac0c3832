"""What a source is before its rows mean anything: parts with rows, each with its place; and the corpus that comes of it.

Owns the notes on rows that are skipped. Knows nothing of files, columns, tokens or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qlora_helpers.base.errors import DataError
from qlora_helpers.data.examples import Example

SPLITS = ("train", "eval", "test")
MIN_ROWS = 3
MAX_NAMED = 20
MAX_ROWS = 2_000_000  # of a source: two million examples without a text take 2 GiB


class Row(NamedTuple):
    """A row as its source gives it: `values` should be a mapping of columns, `where` tells a person where the row is."""

    where: str
    values: Any


@dataclass
class Part:
    """Some rows of a source: a file, or a split of one.

    Attributes:
        name: the file's name (no folder), and the split's where it has several.
        rows: gives the rows from the first one on, each time that it is called. Its argument names the columns that are
            needed; None stands for all, and a source that reads whole rows anyway gives them whole.
        kinds: column -> what keeps it from being used, for columns whose type is known to hold no text.
    """

    name: str
    rows: Callable[[Collection[str] | None], Iterator[Row]]
    kinds: dict[str, str] = field(default_factory=dict)


@dataclass
class Source:
    """What a reader found.

    Attributes:
        name: the file's name (no folder), or the hub's id.
        licence: the terms of the texts, in words.
        splits: parts by `train`, `eval` and `test`; a source without splits of its own has only `train`.
        notes: what a person should know about how it was read.
    """

    name: str
    licence: str
    splits: dict[str, list[Part]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, repr=False)
class Corpus:
    """Examples in three splits that share none; `notes` name what was skipped, cut or changed, `form` what the rows are.

    The splits of a large source are read from a file as they are gone through (`spool`).
    """

    name: str
    licence: str
    train: Sequence[Example]
    eval: Sequence[Example]
    test: Sequence[Example]
    notes: tuple[str, ...]
    form: str = "dialogue"

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, split))} {split}" for split in SPLITS)
        count = len(self.notes)
        return f"Corpus({self.name!r}: {sizes}; licence: {self.licence}; {count} note{'s' * (count != 1)})"


def listed(names: Iterable[Any], most: int = 12) -> str:
    """Lists names for a message: the first `most` quoted, so that no control character reaches a terminal, then a count."""
    quoted = [repr(name if len(str(name)) <= 60 else f"{str(name)[:57]}...") for name in names]
    rest = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + rest if quoted else "none"


class SkippedRows:
    """The rows that are not used: where the first of them are, why they were skipped, and how many of each kind."""

    def __init__(self) -> None:
        self.named: list[tuple[str, str, str]] = []
        self.counts: Counter[str] = Counter()

    def add(self, where: str, kind: str, detail: str = "") -> None:
        """Adds a row: `kind` is a reason that rows are counted by, `detail` what else is known of this row."""
        self.counts[kind] += 1
        if len(self.named) < MAX_NAMED:
            self.named.append((where, kind, detail))

    def notes(self, most: int = MAX_NAMED) -> list[str]:
        """Returns a line for each of the first `most` rows (`MAX_NAMED` at most), and one that counts the rest by kind."""
        named = [f"{where}: skipped, {kind}{detail}" for where, kind, detail in self.named[:most]]
        more = self.counts - Counter(kind for _, kind, _ in self.named[:most])
        rest = "; ".join(f"{count} x {kind}" for kind, count in more.items())
        return named + ([f"and {more.total()} more rows skipped: {rest}"] if rest else [])

    def refuse(self, name: str) -> None:
        """Refuses the data if there is such a row.

        Raises:
            DataError: there is; the message names the first ones and counts the rest.
        """
        if self.counts:
            count = self.counts.total()
            reasons = "".join(f"\n  - {note}" for note in self.notes(5))
            raise DataError(
                f"{name} has {count} row{'s' * (count != 1)} that can't be used",
                next_step=f"Fix them, or leave them out with data.bad_rows=skip:{reasons}",
            )


def need_rows(name: str, splits: Mapping[str, Sized], skipped: SkippedRows, each: bool = False) -> None:
    """Checks that there are `MIN_ROWS` rows, and with `each` at least one in every split.

    Raises:
        DataError: there are fewer; the message says which rows were skipped, and why.
    """
    counts = {split: len(splits.get(split, ())) for split in SPLITS}
    total = sum(counts.values())
    if total >= MIN_ROWS and (not each or all(counts.values())):
        return
    reasons = "".join(f"\n  - {note}" for note in skipped.notes(5))
    raise DataError(
        f"{name} has too few usable rows",
        expected=f"at least {MIN_ROWS}, one or more for each of train, eval and test",
        got=", ".join(f"{count} {split}" for split, count in counts.items()) if each else str(total),
        next_step=f"Add rows, or fix those that were skipped:{reasons}" if reasons else "Add rows.",
    )
