"""Training rows that an evaluation needs: answers that show what kind of task it is, and examples for an untuned model's prompt.

Both are drawn by a seed from the training rows alone, so the same data give the same ones. Knows nothing of tokens or models.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence

from qlora_helpers.data.examples import Example

MOST_ANSWERS, LONGEST_ANSWER = 500, 4000  # answers that are kept; characters of one
MOST_SHOTS = 16  # examples that are kept; an evaluation takes the first that fit
LABEL_REPEATS = (
    5  # training rows to each different answer, on average, from which the examples show many different ones
)


def kept_answers(train: Sequence[Example], seed: int) -> tuple[str, ...]:
    """Returns a sample of the training rows' answers, in the rows' order."""
    usable = [example.answer for example in train if 0 < len(example.answer) <= LONGEST_ANSWER]
    if len(usable) <= MOST_ANSWERS:
        return tuple(usable)
    return tuple(usable[index] for index in sorted(random.Random(seed).sample(range(len(usable)), MOST_ANSWERS)))


def kept_shots(train: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """Returns training rows to show an untuned model in its prompt, in the order in which they are taken.

    They come from the shorter half of the rows, so that several fit. Where rows share answers, as labels do, every answer comes
    once before one comes again, the most frequent first.
    """
    usable = [example for example in train if example.answer and not example.tools]
    drawn = random.Random(seed).sample(usable, len(usable))
    middle = sorted(map(_size, drawn))[(len(drawn) - 1) // 2] if drawn else 0
    drawn = [example for example in drawn if _size(example) <= middle]
    counts = Counter(example.answer for example in usable)
    if len(counts) * LABEL_REPEATS <= len(usable):
        seen: Counter[str] = Counter()
        turns = []
        for place, example in enumerate(drawn):
            turns.append((seen[example.answer], -counts[example.answer], place))
            seen[example.answer] += 1
        drawn = [drawn[place] for _, _, place in sorted(turns)]
    return tuple(dataclasses.replace(example, references=()) for example in drawn[:MOST_SHOTS])


def with_shots(example: Example, shots: Sequence[Example]) -> Example:
    """Returns a row whose conversation begins with other rows', each a question and its answer; a system's text stays first."""
    first = example.messages[:1] if example.messages and example.messages[0].role == "system" else ()
    shown = [message for shot in shots for message in shot.messages if message.role != "system"]
    rest = example.messages[len(first) :]
    return dataclasses.replace(example, messages=(*first, *shown, *rest))


def _size(example: Example) -> int:
    return sum(len(message.content) for message in example.messages)
