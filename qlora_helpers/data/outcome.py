"""What happens to rows while they are labelled, counted and put into words. Knows nothing of templates, tokens or files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What happened to rows while they were labelled.

    Attributes:
        skipped: id, place, kind of reason and detail of each row that is not used.
        trimmed: ids of the rows whose prompt was cut.
        cuts: place and tokens of each, with what was written there.
        split: ids of the documents that were split.
        unended: ids of rows without an end of their own: parts of documents, and documents whose end was cut.
        turns: assistant's turns that are trained.
        masked: why turns are not trained that should be -> how many.
        notes: what a person should know about how rows are written, without repeats.
    """

    skipped: list[tuple[str, str, str, str]] = field(default_factory=list)
    trimmed: list[str] = field(default_factory=list)
    cuts: list[tuple[str, int, str, str]] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    unended: list[str] = field(default_factory=list)
    turns: int = 0
    masked: Counter[str] = field(default_factory=Counter)
    notes: dict[str, None] = field(default_factory=dict)


def outcome_notes(outcome: Outcome, most: int = 20) -> list[str]:
    """Returns what happened to rows in words: the first of each kind by its place, the rest counted."""
    notes = list(outcome.notes)
    total = outcome.turns + sum(outcome.masked.values())
    notes += [
        f"{count} of {total} turns of the assistant are not trained: {reason}"
        for reason, count in outcome.masked.most_common()
    ]
    if outcome.split:
        notes.append(f"{len(outcome.split)} documents are longer than a sequence and were split")
    for where, tokens, side, _ in outcome.cuts[:most]:
        cut = {"start": f"the first {tokens} tokens of its text", "end": f"the last {tokens} tokens of its text"}.get(
            side, f"{tokens} tokens in the middle of its text"
        )
        notes.append(f"{where}: {cut} were cut off")
    if rest := outcome.cuts[most:]:
        notes.append(f"and {len(rest)} more prompts were cut, {sum(tokens for _, tokens, _, _ in rest)} tokens in all")
    notes += [f"{where}: skipped, {kind}{detail}" for _, where, kind, detail in outcome.skipped[:most]]
    counts = Counter(kind for _, _, kind, _ in outcome.skipped[most:])
    if counts:
        kinds = "; ".join(f"{count} x {kind}" for kind, count in counts.items())
        notes.append(f"and {counts.total()} more rows skipped: {kinds}")
    return notes


_SKIPPED = re.compile(r"(?P<where>.+?): skipped, (?P<why>.+)", re.DOTALL)
_MORE = re.compile(r"and (?P<count>\d+) more rows skipped: (?P<kinds>.+)", re.DOTALL)


@dataclass(frozen=True)
class LeftOut:
    """The rows of a source that are not used.

    Attributes:
        named: place and reason of the first ones.
        more: reason -> how many further ones.
    """

    named: tuple[tuple[str, str], ...]
    more: dict[str, int]

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.named) + sum(self.more.values())

    def kinds(self) -> dict[str, int]:
        """Returns how many rows there are of each kind of reason, details such as a row's number aside."""
        found = Counter(self.more)
        known = sorted(self.more, key=len, reverse=True)
        for _, why in self.named:
            plain = re.split(r" of | by | but ", why)[0]
            found[next((kind for kind in known if why.startswith(kind)), plain)] += 1
        return dict(found.most_common())


def left_out(notes: Iterable[str]) -> LeftOut:
    """Finds the rows that are not used among the notes that `outcome_notes` and `rows.SkippedRows` write."""
    named, more = list[tuple[str, str]](), Counter[str]()
    for note in notes:
        if rest := _MORE.fullmatch(note):
            for each in rest["kinds"].split("; "):
                count, _, kind = each.partition(" x ")
                if count.isdecimal():
                    more[kind] += int(count)
        elif found := _SKIPPED.fullmatch(note):
            named.append((found["where"], found["why"]))
    return LeftOut(tuple(named), dict(more))


def shown_cut(cuts: Sequence[tuple[str, int, str, str]]) -> str:
    """Returns one cut as a person should see it; empty where nothing was cut."""
    for where, tokens, _, shown in cuts:
        if shown:
            return f"{where}: {shown.replace('[cut]', f'[{tokens} tokens cut]')}"
    return ""
