"""Blocks of tokens: what they are, how rows are packed into them, and how they become a batch.

A block is `input_ids`, `labels` and `segment_ids` (`(tokens,)` each; rows are numbered from 1) and `row_ids`, the rows' ids. Packed
rows are kept apart by positions that restart and a block-diagonal mask. Knows nothing of dialogues, models or files.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.data.labels import LabelReport
from qlora_helpers.data.sources import Dialogue

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class PreparedData:
    """What the trainer and the evaluation take.

    Attributes:
        train, eval: blocks with `input_ids`, `labels`, `segment_ids` (`(tokens,)` each) and `row_ids`.
        test: dialogues held out for the final comparison.
        report, eval_report: label reports of the two sets.
        packed: whether a block holds several rows.
        seq_len_tokens: length of a packed block.
        notes: what was left out, trimmed or changed on the way, each with its place.
        source: name and licence of the data.
        train_keys: `scorecard.dialogue_key` of every training dialogue: a held-out row that is among them proves nothing.
    """

    train: Dataset
    eval: Dataset
    test: tuple[Dialogue, ...]
    report: LabelReport
    eval_report: LabelReport
    packed: bool
    seq_len_tokens: int
    notes: tuple[str, ...]
    source: str
    train_keys: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        sizes = f"{self.report.rows} training, {self.eval_report.rows} evaluation and {len(self.test)} test rows"
        fill = self.report.tokens / max(1, len(self.train) * self.seq_len_tokens)
        how = f"{len(self.train)} blocks of {self.seq_len_tokens} tokens, {fill:.0%} full" if self.packed else "padded"
        return f"{self.source}: {sizes}; {how}"


def pack(lengths: Sequence[int], capacity: int, *, seed: int) -> list[list[int]]:
    """Puts rows into as few blocks as first-fit decreasing finds (at most 11/9 of the best; Johnson 1973).

    Args:
        lengths: tokens of each row, none longer than `capacity`.
        capacity: tokens of a block.
        seed: of the order among equally long rows, and of the blocks.

    Returns:
        Indices of the rows in each block; every row once.
    """
    order = list(range(len(lengths)))
    shuffler = random.Random(seed)
    shuffler.shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    blocks: list[list[int]] = []
    room: list[int] = []
    for index in order:
        place = next((i for i, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            blocks.append([])
            room.append(capacity)
            place = len(blocks) - 1
        blocks[place].append(index)
        room[place] -= lengths[index]
    shuffler.shuffle(blocks)
    return blocks


class NumberedBlocks:
    """Blocks that carry their number, so that a batch can say which it was made of (`blocks`, `(blocks,)`)."""

    def __init__(self, blocks: Dataset) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.blocks[number] | {"block": number}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        found = self.blocks.__getitems__(list(numbers))
        return [block | {"block": number} for block, number in zip(found, numbers, strict=True)]
