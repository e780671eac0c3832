"""Packs rows into sequences, and defines what prepared data are.

A sequence is `input_ids`, `labels` and `segment_ids` (`(tokens,)` each; rows are numbered from 1) and `row_ids`, the rows' ids. It
holds several rows where they are packed, and one row where they are padded. `batches` keeps the rows from attending to each
other. Knows nothing of models or files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data.examples import Example
from qlora_helpers.data.label_report import LabelReport

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.row_view import SeenRow


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
        template: the name of the template that rows were written with.
        config: the settings that they were prepared by.
        scripts: script -> rows of a sample of the training rows that are written in it.
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
    template: str = ""
    config: DataConfig | None = None
    scripts: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = f"{self.report.rows} training, {self.eval_report.rows} evaluation and {len(self.test)} test rows"
        fill = self.report.tokens / max(1, len(self.train) * self.seq_len_tokens)
        how = (
            f"{len(self.train)} sequences of {self.seq_len_tokens} tokens, {fill:.0%} full" if self.packed else "padded"
        )
        return f"{self.source}: {sizes}; {how}"

    def seen_by(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Example], SeenRow]:
        """Returns a function that says of a row of the source what these data make of it.

        Args:
            tokenizer: the model's.

        Raises:
            DataError: these data don't say how they were prepared.
            ModelError: the template does not work with the tokenizer.
        """
        from qlora_helpers.data.row_view import seen_row
        from qlora_helpers.data.templates import template_of

        if self.config is None:
            raise DataError("these data don't say how they were prepared", next_step="Prepare them again.")
        return partial(seen_row, template=template_of(self.config, tokenizer), config=self.config)


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
    room = Room(len(lengths), capacity)
    for index in order:
        place = room.take(lengths[index])
        if place == len(sequences):
            sequences.append([])
        sequences[place].append(index)
    shuffler.shuffle(sequences)
    return sequences


class Room:
    """Free room in sequences that begin empty: finds the first one with enough of it in logarithmic time.

    A tree over the sequences: each node holds the most room that a sequence below it has.

    Args:
        count: the most sequences that can be needed.
        capacity: tokens of a sequence.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self.size = 1 << max(0, count - 1).bit_length()
        self.most = [capacity] * (2 * self.size)
        self.steps = 0

    def take(self, tokens: int) -> int:
        """Takes room in the first sequence that has enough, and returns that sequence's number."""
        most, node = self.most, 1
        while node < self.size:
            node *= 2
            if most[node] < tokens:
                node += 1
            self.steps += 1
        most[node] -= tokens
        place = node - self.size
        while node > 1:
            node //= 2
            left, right = most[2 * node], most[2 * node + 1]
            highest = left if left > right else right
            if most[node] == highest:
                break
            most[node] = highest
            self.steps += 1
        return place


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
