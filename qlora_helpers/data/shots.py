"""Training rows that an evaluation needs: answers that show what kind of task it is, and examples for an untuned model's prompt.

Both are drawn by a seed from the training rows alone, so the same data give the same ones. Knows nothing of tokens or models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from qlora_helpers.data.examples import Example

MOST_ANSWERS, LONGEST_ANSWER = 500, 4000  # answers that are kept; characters of one
MOST_SHOTS = 16  # examples that are kept; an evaluation takes the first that fit
LABEL_REPEATS = (
    5  # training rows to each different answer, on average, from which the examples show many different ones
)


def kept_answers(train: Sequence[Example], seed: int) -> tuple[str, ...]:
    """Returns a sample of the training rows' answers, in the rows' order."""
    return _kept_answers(train, [row_size(example) for example in train], seed)


def kept_shots(train: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """Returns training rows to show an untuned model in its prompt, in the order in which they are taken.

    They come from the shorter half of the rows, so that several fit. Where rows share answers, as labels do, every answer comes
    once before one comes again, the most frequent first.
    """
    return _kept_shots(train, [row_size(example) for example in train], seed)


class RowSize(NamedTuple):
    """What the choice needs of a row: the characters of its answer and of all its messages, a hash of the answer, and its tools."""

    answer: int
    whole: int
    mark: bytes
    has_tools: bool


def row_size(example: Example) -> RowSize:
    """Measures a row."""
    answer = example.answer
    mark = hashlib.blake2b(answer.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    whole = sum(len(message.content) for message in example.messages)
    return RowSize(len(answer), whole, mark, bool(example.tools))


def kept_rows(
    train: Sequence[Example], sizes: Sequence[RowSize], seed: int
) -> tuple[tuple[str, ...], tuple[Example, ...]]:
    """Returns what `kept_answers` and `kept_shots` do, of rows that were measured as they went by."""
    return _kept_answers(train, sizes, seed), _kept_shots(train, sizes, seed)


def _kept_answers(train: Sequence[Example], sizes: Sequence[RowSize], seed: int) -> tuple[str, ...]:
    usable = [place for place, size in enumerate(sizes) if 0 < size.answer <= LONGEST_ANSWER]
    if len(usable) > MOST_ANSWERS:
        usable = sorted(random.Random(seed).sample(usable, MOST_ANSWERS))
    return tuple(train[place].answer for place in usable)


def _kept_shots(train: Sequence[Example], sizes: Sequence[RowSize], seed: int) -> tuple[Example, ...]:
    usable = [place for place, size in enumerate(sizes) if size.answer and not size.has_tools]
    drawn = random.Random(seed).sample(usable, len(usable))
    middle = sorted(sizes[place].whole for place in drawn)[(len(drawn) - 1) // 2] if drawn else 0
    drawn = [place for place in drawn if sizes[place].whole <= middle]
    counts = Counter(sizes[place].mark for place in usable)
    if len(counts) * LABEL_REPEATS <= len(usable):
        seen: Counter[bytes] = Counter()
        turns = []
        for order, place in enumerate(drawn):
            mark = sizes[place].mark
            turns.append((seen[mark], -counts[mark], order))
            seen[mark] += 1
        drawn = [drawn[order] for _, _, order in sorted(turns)]
    return tuple(dataclasses.replace(train[place], references=()) for place in drawn[:MOST_SHOTS])


def with_shots(example: Example, shots: Sequence[Example]) -> Example:
    """Returns a row whose conversation begins with other rows', each a question and its answer; a system's text stays first."""
    first = example.messages[:1] if example.messages and example.messages[0].role == "system" else ()
    shown = [message for shot in shots for message in shot.messages if message.role != "system"]
    rest = example.messages[len(first) :]
    return dataclasses.replace(example, messages=(*first, *shown, *rest))
