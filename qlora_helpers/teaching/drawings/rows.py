"""Drawings of rows: which tokens of a row are trained, and which tokens of packed rows may attend to which."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_helpers.base.errors import UserError
from qlora_helpers.teaching.drawings.canvas import WIDTH, Canvas, Drawing, paint

PROMPT = ("Summarize", ":", "Ann", ":", "lunch", "?", "Summary", ":")
ANSWER = ("Ann", "wants", "lunch", ".")
SHADES = ("blue", "activations", "gradients")


def labels(prompt: Sequence[str], answer: Sequence[str], padding: int) -> list[str]:
    """Returns a row's labels as texts: -100 where a token does not count in the loss, and else the token."""
    return ["−100"] * len(prompt) + [*answer, "END"] + ["−100"] * padding


def masked_row(prompt: Sequence[str] = PROMPT, answer: Sequence[str] = ANSWER, *, padding: int = 2) -> Drawing:
    """Draws a row of tokens with its labels: what is trained and what is not.

    Args:
        prompt: tokens up to where the answer begins.
        answer: tokens of the answer, without its end.
        padding: padding tokens after the end.
    """
    canvas, x, starts = Canvas(), 84.0, []
    tokens = [*prompt, *answer, "END", *["PAD"] * padding]
    texts = labels(prompt, answer, padding)
    canvas.text(16, 60, "tokens")
    canvas.text(16, 112, "labels")
    for at, (token, label) in enumerate(zip(tokens, texts, strict=True)):
        width = max(34.0, 12 + 8 * len(token))
        starts.append(x)
        trained, end, pad = label != "−100", token == "END", at >= len(tokens) - padding
        shade = paint("trained-line") if trained else "currentColor"
        for y, text in ((40, token), (92, label)):
            filled = trained and (y == 92 or not end)
            canvas.box(x, y, width, 30, fill=shade, line=shade, opacity=0.25 if trained else 0.06, dashed=pad)
            canvas.text(
                x + width / 2, y + 20, text, size=12, anchor="middle", mono=True, bold=filled or end, quiet=not trained
            )
        x += width + 4
    first, last = len(prompt), len(tokens) - padding
    starts.append(x)
    for line, (begin, stop, text) in enumerate(
        ((0, first, "the prompt: read, not trained"), (first, last, "the answer and its END: trained"))
    ):
        left, right = starts[begin], starts[stop] - 4
        canvas.line([(left, 136), (left, 142), (right, 142), (right, 136)])
        canvas.text(left, 160 + 18 * line, text, size=12, bold=line > 0)
    canvas.text(16, 24, "Each label is predicted from the tokens to its left. −100 means: this one does not count.")
    counted = sum(text != "−100" for text in texts)
    return canvas.finish(
        "A row and which of its tokens are trained",
        f"A row has {len(tokens)} tokens: {len(prompt)} of the prompt, {len(answer)} of the answer, END, and {padding} of "
        f"padding. The labels of prompt and padding are -100, so they do not count in the loss. The answer and its END are "
        f"trained, {counted} tokens in all.",
        194,
        width=max(WIDTH, int(x) + 16, int(starts[first]) + 260),
    )


def may_attend(segments: Sequence[int], *, apart: bool) -> list[list[bool]]:
    """Returns for each token (a row of the table) whether it may look at each other token.

    Args:
        segments: for each token the number of its row, 0 for padding.
        apart: whether tokens may look at their own row alone, or at all earlier tokens.
    """
    places = range(len(segments))
    return [[there <= here and (not apart or segments[there] == segments[here]) for there in places] for here in places]


def packed_rows(lengths: Sequence[int] = (3, 2), *, sequence: int = 6) -> Drawing:
    """Draws rows packed into one sequence, and which tokens attend to which, with and without a block-diagonal mask.

    Args:
        lengths: tokens of each row; 1 to 3 rows.
        sequence: tokens of the sequence, at most 8.

    Raises:
        UserError: rows that don't fit the sequence, or can't be drawn.
    """
    if not 1 <= len(lengths) <= 3 or min(lengths) < 1 or sum(lengths) > sequence or sequence > 8:
        raise UserError(
            "those rows can't be drawn",
            expected="1 to 3 rows that fit a sequence of at most 8 tokens",
            got=f"rows of {list(lengths)} in a sequence of {sequence}",
        )
    segments = [row for row, length in enumerate(lengths, start=1) for _ in range(length)]
    segments += [0] * (sequence - len(segments))
    canvas, cell = Canvas(), 24
    canvas.text(16, 24, "One sequence", bold=True)
    for at, row in enumerate(segments):
        x, shade = 16 + 42 * at, SHADES[row - 1] if row else "grey"
        canvas.box(x, 36, 38, 30, fill=paint(shade), line=paint(shade), opacity=0.25 if row else 0.08, dashed=not row)
        canvas.text(x + 19, 56, f"row {row}" if row else "pad", size=11, anchor="middle")
        position = at - segments.index(row)
        canvas.text(x + 19, 84, str(position), size=12, anchor="middle", mono=True)
    canvas.text(16 + 42 * sequence + 10, 84, "positions begin again with each row", size=12, quiet=True)
    leaks = 0
    for left, apart, name in ((50, False, "earlier tokens of any row: wrong"), (390, True, "its own row alone: right")):
        canvas.text(left, 122, name, bold=True)
        for here, allowed in enumerate(may_attend(segments, apart=apart)):
            y = 136 + here * cell
            canvas.text(left - 8, y + 16, str(here + 1), size=11, anchor="end", quiet=True)
            for there, seen in enumerate(allowed):
                x, leak = left + there * cell, seen and segments[there] != segments[here]
                shade = paint("orange" if leak else SHADES[segments[here] - 1] if segments[here] else "grey")
                canvas.box(x, y, cell, cell, fill=shade if seen else "none", opacity=0.45, line=paint("line"))
                if leak:
                    leaks += 1
                    canvas.line([(x + 6, y + 6), (x + cell - 6, y + cell - 6)], width=1.5)
                    canvas.line([(x + cell - 6, y + 6), (x + 6, y + cell - 6)], width=1.5)
    bottom = 136 + sequence * cell
    canvas.text(
        50, bottom + 24, "Down: the token that looks. Across: what it looks at. A cross is a leak between rows."
    )
    return canvas.finish(
        "Packed rows and their attention",
        f"Rows of {', '.join(map(str, lengths))} tokens share a sequence of {sequence}. If each token may look at every earlier "
        f"one, {leaks} of the pairs join different rows. With a block-diagonal mask a token looks at earlier tokens of its own "
        f"row alone: a triangle for each row, and nothing beside it.",
        bottom + 40,
    )
