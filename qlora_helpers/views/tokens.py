"""A row of tokens as coloured text, with what is trained and what is masked."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.text import plain
from qlora_helpers.data.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LONGEST_CHARACTER = 8  # tokens; UTF-8 has four bytes a character


class TokenView:
    """A block's tokens, marked by what happens to them: coloured in a notebook, bracketed where there are no colours.

    Args:
        block: `input_ids`, `labels` and, where there are several rows, `segment_ids`.
        tokenizer: the model's.
        most: show at most so many tokens.
    """

    COLOURS = {"trained": "#1a7f37", "end": "#b35900", "masked": "#6e7781", "padding": "#afb8c1"}

    def __init__(self, block: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, most: int = 400) -> None:
        ids, labels = list(block["input_ids"]), list(block["labels"])
        segments = list(block.get("segment_ids") or [1] * len(ids))
        self.tokens = [
            (text, token_kind(token, label, segment, tokenizer.eos_token_id), segment)
            for text, token, label, segment in zip(
                token_texts(ids[:most], tokenizer), ids[:most], labels[:most], segments[:most], strict=True
            )
        ]
        self.hidden = max(0, len(ids) - most)

    def __repr__(self) -> str:
        """Trained tokens in [brackets], the trained end as [END], masked text as it is, a bar between rows."""
        parts, last_kind, last_segment = [], "", None
        for text, kind, segment in self.tokens:
            opens, closes = kind in ("trained", "end"), last_kind in ("trained", "end")
            parts += ["]" if closes and (not opens or segment != last_segment) else ""]
            parts += ["\n| " if last_segment not in (None, segment) else ""]
            parts += ["[" if opens and (not closes or segment != last_segment) else ""]
            parts.append({"end": "END", "padding": "."}.get(kind, text))
            last_kind, last_segment = kind, segment
        return "".join(parts) + ("]" if last_kind in ("trained", "end") else "") + self._rest()

    def _repr_html_(self) -> str:
        parts, last_segment = [], None
        for text, kind, segment in self.tokens:
            if last_segment not in (None, segment):
                parts.append("<hr style='margin:4px 0'>")
            shown = html.escape({"end": text or "END"}.get(kind, text)).replace("\n", "↵<br>")
            weight = "600" if kind in ("trained", "end") else "400"
            line = "underline" if kind in ("trained", "end") else "none"
            style = f"color:{self.COLOURS[kind]};font-weight:{weight};text-decoration:{line}"
            parts.append(f"<span title='{kind}' style='{style}'>{shown}</span>")
            last_segment = segment
        legend = " ".join(f"<b style='color:{colour}'>{kind}</b>" for kind, colour in self.COLOURS.items())
        body = "".join(parts) + html.escape(self._rest())
        return (
            f"<div style='font-family:monospace;line-height:1.5'>{body}<div style='margin-top:6px'>{legend}</div></div>"
        )

    def _rest(self) -> str:
        return f" ... and {self.hidden} more tokens" if self.hidden else ""


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds, as it may be shown: without control characters.

    A character made of several tokens (an emoji) stands at its last one; the others add none.
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
    """What happens to a token: `padding`, `masked`, `end` (the trained end of the text) or `trained`."""
    if segment == 0:
        return "padding"
    if label == IGNORED:
        return "masked"
    return "end" if token == eos else "trained"
