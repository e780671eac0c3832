"""Asks an untuned model with a few training examples in its prompt: the rival that costs no training.

Brown et al. 2020 (arXiv:2005.14165). Each prompt gets as many examples as fit before it whole; they are the same for every row,
in the same order. Works on token ids. Knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora_helpers.data.examples import Example

Tokenise = Callable[[Example, Sequence[Example]], list[int]]
BETWEEN = "\n\n"  # after each example in plain text


@dataclass(frozen=True)
class FewShotPrompts:
    """Prompts with examples.

    Attributes:
        ids: token ids of each row's prompt.
        shown: how many examples stand in each.
        asked: how many were asked for.
    """

    ids: list[list[int]]
    shown: list[int]
    asked: int

    def remark(self) -> str:
        """Says how many examples the prompts have."""
        fewer, none = (sum(count < limit for count in self.shown) for limit in (self.asked, 1))
        if not fewer:
            many = f"{self.asked} training example{'s' * (self.asked != 1)}"
            return f"{many} stood in each prompt of the untuned model with examples"
        without = f", {none} of them for none" if none else ""
        return (
            f"{self.asked} training examples were asked for in each prompt of the untuned model with examples; {fewer} of "
            f"{len(self.shown)} rows had room for fewer{without}"
        )


def few_shot_prompts(
    items: Sequence[Example], shots: Sequence[Example], tokens_of: Tokenise, room: int
) -> FewShotPrompts | None:
    """Puts examples before each row's prompt, as many as fit.

    Args:
        items: the rows that are asked.
        shots: the examples, the first that is to be shown first.
        tokens_of: returns the token ids of a row's prompt with these examples before it.
        room: tokens that a prompt may have.

    Returns:
        The prompts, or None where no row has room for an example.
    """
    ids, shown = [], []
    for item in items:
        best, count = tokens_of(item, ()), 0
        for taken in range(1, len(shots) + 1):
            longer = tokens_of(item, shots[:taken])
            if len(longer) > room:
                break
            best, count = longer, taken
        ids.append(best)
        shown.append(count)
    return FewShotPrompts(ids, shown, len(shots)) if any(shown) else None


def no_examples(shots: Sequence[Example]) -> str:
    """Says why the untuned model was not asked with examples."""
    why = "no row leaves room for one" if shots else "the prepared data hold none (an earlier version prepared them)"
    return f"the untuned model was not asked with examples in its prompt: {why}"


def first_answer(text: str, shots: Sequence[Example], opening: str) -> str:
    """Cuts an answer where the model goes on with an example of its own, as one that saw several in plain text often does.

    Args:
        text: what the model wrote.
        shots: the examples that it saw; if none of their answers has a line break, the answer ends at the first one.
        opening: what every example begins with, such as an instruction; may be empty.
    """
    if opening.strip():
        text = text.split(opening.strip())[0]
    if all("\n" not in shot.answer.strip() for shot in shots):
        return text.strip().split("\n")[0].strip()
    if all(BETWEEN not in shot.answer.strip() for shot in shots):
        return text.strip().split(BETWEEN)[0].strip()
    return text.strip()
