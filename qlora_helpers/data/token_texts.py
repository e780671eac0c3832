"""What each token of a row says, and what happens to it in training. Knows nothing of how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_helpers.base.text import plain
from qlora_helpers.data.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_CHARACTER = 8  # tokens; a character has at most four bytes in UTF-8
KINDS = ("trained", "end", "masked", "padding")
"""What can happen to a token; each is a class in the stylesheet."""


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the text that each token adds, without control characters.

    A character made of several tokens, such as an emoji, is the text of its last token; the others add nothing.
    """
    texts, open_ids = [], []
    for token in ids:
        open_ids.append(token)
        text = tokenizer.decode(open_ids)
        unfinished = text.endswith("\ufffd") and len(open_ids) < LONGEST_CHARACTER
        texts.append("" if unfinished else text)
        open_ids = open_ids if unfinished else []
    if open_ids:
        texts[-1] = tokenizer.decode(open_ids)
    return [plain(text) for text in texts]


def token_kind(token: int, label: int, segment: int, eos: int) -> str:
    """Returns what happens to a token: `padding`, `masked`, `end` (the trained end of the text) or `trained`."""
    if segment == 0:
        return "padding"
    if label == IGNORED:
        return "masked"
    return "end" if token == eos else "trained"
