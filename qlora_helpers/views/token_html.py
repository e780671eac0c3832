"""Tokens as HTML for the panels: an element for each, in the colour of what happens to it, and a key with counts.

The colours are classes of the stylesheet's part `panel`. Everything that a row says is escaped.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

KINDS = {
    "trained": "trained: the model learns to write it",
    "end": "END: the end-of-text token, trained",
    "masked": "masked: the model reads it and does not learn to write it",
    "padding": "padding: fills the sequence",
}


def spans(texts: Sequence[str], kinds: Sequence[str], *, ids: Sequence[int] = (), query: str = "") -> str:
    """Returns a row's tokens, with a frame around those that contain the text searched for.

    Args:
        texts, kinds: of each token (`data.token_texts`).
        ids: of each token, shown under the pointer; may be empty.
        query: the text searched for.
    """
    found, place = set(), 0
    if query:
        ends = [match.span() for match in re.finditer(re.escape(query), "".join(texts), re.IGNORECASE)]
        for index, text in enumerate(texts):
            if any(start < place + len(text) and place < end for start, end in ends):
                found.add(index)
            place += len(text)
    parts = []
    for index, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if not text and kind != "end":
            continue  # part of a character whose text is that of a later token
        shown = "END" if kind == "end" else html.escape(text).replace("\n", "↵\n")
        mark = " k-found" if index in found else ""
        title = f"{kind}, token {ids[index]}" if ids else kind
        parts.append(f'<s class="k-{kind}{mark}" title="{title}">{shown}</s>')
    return "".join(parts)


def key(counts: Mapping[str, int]) -> str:
    """Returns what the colours mean, with how many tokens have each."""
    total = max(1, sum(counts.values()))
    lines = "".join(
        f'<span><span class="k-{kind}">{text.partition(":")[0]}</span>{text[len(text.partition(":")[0]) :]} '
        f"({counts[kind]:,} tokens, {counts[kind] / total:.0%})</span>"
        for kind, text in KINDS.items()
        if counts.get(kind)
    )
    return f'<div class="qlora-kinds">{lines}</div>'


def framed(inside: str, label: str) -> str:
    """Returns tokens in a frame that scrolls, which the keyboard reaches and a screen reader names."""
    return f'<div class="qlora-text qlora-tokens" tabindex="0" role="region" aria-label="{html.escape(label)}">{inside}</div>'
