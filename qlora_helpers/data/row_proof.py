"""Proves each row on its tokens: exactly the assistant's texts and their ends are trained, after the prompt that asks for them.

For every turn that a template offers, three things are checked on the row's own tokens: the prompt before it, tokenised as a server
does, is token for token how the row begins; the trained tokens decode to the turn's text; and they hold no control token but the
template's. A turn that fails is masked, with the reason. Knows nothing of templates and files.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qlora_helpers.data.encoding import Bounded, Decoder, Encoded, Encoder
from qlora_helpers.data.rendering import Rendering, Span, Turn

NEAR = 400  # characters before a turn in which a control token is looked for
_LONG_RUN = re.compile(r"[^\w\s]{31}")  # such as combining marks, which take the square of their number to normalise
SEAM = "its first characters join with the prompt's last ones into one token"
NOT_EXACT = "the tokenizer can't write its text exactly"
TYPED = "text of its own would become a control token"
NORMALISED = "the tokenizer changes white space, case or forms of some characters in the answers"


@dataclass
class Proved:
    """A row's tokens with what may be trained of them.

    Attributes:
        ids: `(tokens,)`, int32.
        begins: tokens at the start that are not of the row's text.
        turns: the turns that are proved.
        spans: of each, its first token and the one behind its last.
        masked: place in the messages -> why that turn is not trained.
        normalised: whether a text is the same only up to white space, case and forms of characters.
    """

    ids: np.ndarray
    begins: int
    turns: list[Turn] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    masked: list[tuple[int, str]] = field(default_factory=list)
    normalised: bool = False


@dataclass(frozen=True)
class Apart:
    """A row whose one turn was tokenised apart from its prompt, since no control token is near by which they are divided anyway.

    Attributes:
        ids: `(tokens,)`, int32.
        begins: tokens at the start that are not of the row's text.
        span: the turn's first token, and the one behind its last.
    """

    ids: np.ndarray
    begins: int
    span: Span


Tokens = Bounded | Encoded | Apart


def tokenised(rows: Sequence[Rendering], encoder: Encoder) -> list[Tokens]:
    """Tokenises rendered rows: the part of `prove` that takes longest, and that another thread may do ahead."""
    apart = [number for number, row in enumerate(rows) if _is_apart(row, encoder)]
    found: dict[int, Tokens] = dict(zip(apart, _apart([rows[i] for i in apart], encoder), strict=True))
    whole = [number for number in range(len(rows)) if number not in found]
    found |= dict(zip(whole, encoder.bounded([rows[i] for i in whole]), strict=True))
    return [found[number] for number in range(len(rows))]


def prove(rows: Sequence[Rendering], encoder: Encoder, encoded: Sequence[Tokens] | None = None) -> list[Proved]:
    """Tokenises rendered rows and proves their turns.

    Args:
        rows: what a template made of them.
        encoder: the template's.
        encoded: their tokens (`tokenised`), if they were made already.
    """
    encoded = tokenised(rows, encoder) if encoded is None else encoded
    proved = [Proved(each.ids, each.begins, masked=list(row.masked)) for row, each in zip(rows, encoded, strict=True)]
    _check_seams(rows, encoded, proved, encoder)
    _check_texts(rows, proved, encoder)
    return proved


def _check_seams(
    rows: Sequence[Rendering], encoded: Sequence[Tokens], proved: Sequence[Proved], encoder: Encoder
) -> None:
    """Finds each turn's tokens, and keeps the turns before which the prompt's own tokens stand."""
    contexts: dict[tuple[str, tuple[Span, ...]], int] = {}
    wanted = []
    for number, (row, tokens) in enumerate(zip(rows, encoded, strict=True)):
        if isinstance(tokens, Apart):
            proved[number].turns, proved[number].spans = list(row.turns), [tokens.span]
            continue
        for turn in row.turns:
            behind = _behind(tokens, turn.end, len(row.text))
            if turn.start == 0:  # a document, or a prompt that is empty
                proved[number].turns.append(turn)
                proved[number].spans.append((tokens.begins, behind))
                continue
            # Control tokens divide a text into parts that are tokenised apart: the prompt's last part settles its end.
            control = encoder.control.last_before(row.text, turn.start, row.typed, NEAR)
            begin = control[0] if control else 0
            place = _first(tokens, begin, len(row.text)) if begin else tokens.begins
            key = (row.text[begin : turn.start], _within(row.typed, begin, turn.start))
            first = tokens.token_at(turn.start, len(row.text)) if isinstance(tokens, Encoded) else None
            wanted.append((number, turn, contexts.setdefault(key, len(contexts)), place, (first, behind)))
    found = encoder.contexts(contexts)
    for number, turn, context, place, (first, behind) in wanted:
        row, made = rows[number], proved[number]
        # Without the places of tokens, the turn begins behind as many as its prompt's end has; its text is decoded below.
        first = place + len(found[context]) if first is None else first
        if np.array_equal(found[context], made.ids[place:first]):
            made.turns.append(turn)
            made.spans.append((first, behind))
        elif turn is row.turns[-1] and turn.end == len(row.text):
            (again,) = _apart([row], encoder)
            made.ids = again.ids
            made.turns.append(turn)
            made.spans.append(again.span)
        else:
            made.masked.append((turn.message, SEAM))


def _first(tokens: Bounded | Encoded, place: int, length: int) -> int:
    return tokens.first[place] if isinstance(tokens, Bounded) else tokens.token_at(place, length)


def _behind(tokens: Bounded | Encoded, place: int, length: int) -> int:
    return tokens.behind[place] if isinstance(tokens, Bounded) else tokens.token_behind(place, length)


def _is_apart(row: Rendering, encoder: Encoder) -> bool:
    """Whether a row ends with its one turn, behind a prompt that would have to be tokenised again for a look at its end."""
    if len(row.turns) != 1 or row.turns[0].start < NEAR or row.turns[0].end != len(row.text):
        return False
    return encoder.control.last_before(row.text, row.turns[0].start, row.typed, NEAR) is None


def _apart(rows: Sequence[Rendering], encoder: Encoder) -> list[Apart]:
    """Tokenises rows' last turns apart from their prompts, as they are when the model writes them.

    What comes before the last turn is what a server gives it, so its tokens differ from the whole text's at the seam alone.
    """
    control = encoder.tokenizer.eos_token  # some tokenizers put a space before a text's first word
    parts = []
    for row in rows:
        start = row.turns[-1].start
        parts.append(Rendering(row.text[:start], typed=_within(row.typed, 0, start), begin=row.begin))
        typed = tuple((a + len(control), b + len(control)) for a, b in _within(row.typed, start, len(row.text)))
        parts.append(Rendering(control + row.text[start:], typed=typed))
    encoded = iter(encoder.encode(parts, places=False))
    found = []
    for prompt, answer in zip(encoded, encoded, strict=True):
        ids = np.concatenate([prompt.ids, answer.ids[1:]])
        found.append(Apart(ids, prompt.begins, (len(prompt.ids), len(ids))))
    return found


def _within(typed: Sequence[Span], start: int, end: int) -> tuple[Span, ...]:
    return tuple((a - start, b - start) for a, b in typed if start <= a and b <= end)


def _check_texts(rows: Sequence[Rendering], proved: Sequence[Proved], encoder: Encoder) -> None:
    """Keeps the turns whose tokens decode to their text and hold no control token of the row's own making."""
    pieces = [
        (made.ids[max(0, start - 1) : start], made.ids[start:end]) for made in proved for start, end in made.spans
    ]
    texts = iter(Decoder(encoder.backend).pairs(pieces))
    for row, made in zip(rows, proved, strict=True):
        kept = []
        typed_made = bool(row.typed) and _controls_differ(row, made, encoder)
        for turn, span in zip(made.turns, made.spans, strict=True):
            together, before = next(texts)
            text = row.text[turn.start : turn.end]
            exact, alike = same_text(together, before, text)
            own = len(encoder.control.spans(text, typed=_within(row.typed, turn.start, turn.end)))
            if not exact and not alike:
                made.masked.append((turn.message, NOT_EXACT))
            elif typed_made or encoder.controls(made.ids[slice(*span)]) != own:
                made.masked.append((turn.message, TYPED))
            else:
                made.normalised |= not exact
                kept.append((turn, span))
        made.turns, made.spans = [turn for turn, _ in kept], [span for _, span in kept]
        made.masked.sort()


def _controls_differ(row: Rendering, made: Proved, encoder: Encoder) -> bool:
    own = len(encoder.control.spans(row.text, typed=row.typed))
    return encoder.controls(made.ids[made.begins :]) != own


def same_text(together: str, before: str, text: str) -> tuple[bool, bool]:
    """Whether tokens decode to a text, exactly, and up to white space, case and forms of characters.

    Args:
        together: what they decode to with the token before them, since some decoders drop a text's first space.
        before: what that token decodes to.
        text: what they should decode to.
    """
    found = together[len(before) :] if together.startswith(before) else together
    if found == text or found == text.replace(
        "\u2581", " "
    ):  # SentencePiece's sign for a space, also in control tokens
        return True, True
    return False, _folded(found) == _folded(text)


def _folded(text: str) -> str:
    if not _LONG_RUN.search(text):
        text = unicodedata.normalize("NFKC", text)
    return "".join(text.casefold().split())
