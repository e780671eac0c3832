"""Packs rows into sequences, and defines what prepared data are.

A sequence is `input_ids`, `labels` and `segment_ids` (`(tokens,)` each; rows are numbered from 1) and `row_ids`, the rows' ids. It
holds several rows where they are packed, and one row where they are padded. `batches` keeps the rows from attending to each
other. Knows nothing of models or files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.data.examples import Example
from qlora_helpers.data.labels import LabelReport

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class PreparedData:
    """The data that the trainer and the evaluation take.

    Attributes:
        train, eval: sequences with `input_ids`, `labels`, `segment_ids` (`(tokens,)` each) and `row_ids`.
        test: rows held out for the final comparison.
        report, eval_report: label reports of the two sets.
        packed: whether a sequence may hold several rows.
        seq_len_tokens: length of a packed sequence.
        notes: what was skipped, trimmed or changed, and where it is in the source.
        source: name and licence of the data.
        train_keys: `duplicates.prompt_key` of every training row: a held-out row that is among them proves nothing.
        train_answers: a sample of the training rows' answers, from which an evaluation sees what kind of task it is.
        shots: training rows to show an untuned model in its prompt (`shots.kept_shots`).
    """

    train: Dataset
    eval: Dataset
    test: tuple[Example, ...]
    report: LabelReport
    eval_report: LabelReport
    packed: bool
    seq_len_tokens: int
    notes: tuple[str, ...]
    source: str
    train_keys: frozenset[str] = frozenset()
    train_answers: tuple[str, ...] = ()
    shots: tuple[Example, ...] = ()

    def __repr__(self) -> str:
        sizes = f"{self.report.rows} training, {self.eval_report.rows} evaluation and {len(self.test)} test rows"
        fill = self.report.tokens / max(1, len(self.train) * self.seq_len_tokens)
        how = (
            f"{len(self.train)} sequences of {self.seq_len_tokens} tokens, {fill:.0%} full" if self.packed else "padded"
        )
        return f"{self.source}: {sizes}; {how}"


def pack(lengths: Sequence[int], capacity: int, *, seed: int) -> list[list[int]]:
    """Puts rows into few sequences by first-fit decreasing: at most about 11/9 of the fewest possible (Johnson 1973).

    Args:
        lengths: tokens of each row, none longer than `capacity`.
        capacity: tokens of a sequence.
        seed: of the order among equally long rows, and of the sequences.

    Returns:
        Indices of the rows in each sequence; every row once.
    """
    order = list(range(len(lengths)))
    shuffler = random.Random(seed)
    shuffler.shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    sequences: list[list[int]] = []
    room: list[int] = []
    for index in order:
        place = next((i for i, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            sequences.append([])
            room.append(capacity)
            place = len(sequences) - 1
        sequences[place].append(index)
        room[place] -= lengths[index]
    shuffler.shuffle(sequences)
    return sequences


class NumberedSequences:
    """Sequences that carry their number, so that a batch can say which it was made of (`sequences`, `(sequences,)`)."""

    def __init__(self, sequences: Dataset) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.sequences[number] | {"sequence": number}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        found = self.sequences.__getitems__(list(numbers))
        return [sequence | {"sequence": number} for sequence, number in zip(found, numbers, strict=True)]
