"""A row of tokens as coloured text that shows which of them are trained and which are masked."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.style import inline
from qlora_helpers.base.tables import AS_TEXT
from qlora_helpers.data.token_texts import KINDS, token_kind, token_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


__all__ = ["KINDS", "TokenView", "token_kind", "token_texts"]


class TokenView:
    """A sequence of tokens marked by what happens to them: in colours in a notebook, in brackets where there are no colours.

    Args:
        sequence: `input_ids`, `labels` and, for a packed sequence of several rows, `segment_ids`.
        tokenizer: the model's tokenizer.
        most: the largest number of tokens to show.
    """

    def __init__(self, sequence: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, most: int = 400) -> None:
        ids, labels = list(sequence["input_ids"]), list(sequence["labels"])
        segments = list(sequence.get("segment_ids") or [1] * len(ids))
        self.tokens = [
            (text, token_kind(token, label, segment, tokenizer.eos_token_id), segment)
            for text, token, label, segment in zip(
                token_texts(ids[:most], tokenizer), ids[:most], labels[:most], segments[:most], strict=True
            )
        ]
        self.hidden = max(0, len(ids) - most)

    def __repr__(self) -> str:
        """Returns trained tokens in [brackets], the trained end as [END], masked text as it is, and a bar between rows."""
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
                parts.append(f'<hr style="{inline("between")}">')
            shown = html.escape({"end": text or "END"}.get(kind, text)).replace("\n", "↵<br>")
            parts.append(f"<span title='{kind}' style='{inline(kind)}'>{shown}</span>")
            last_segment = segment
        key = " ".join(f'<span style="{inline(kind)}">{kind}</span>' for kind in KINDS)
        body = "".join(parts) + html.escape(self._rest())
        return f'<div {AS_TEXT} style="{inline("tokens")}">{body}<div style="{inline("key")}">{key}</div></div>'

    def _rest(self) -> str:
        return f" ... and {self.hidden} more tokens" if self.hidden else ""
