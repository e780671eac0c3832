"""Decides which tokens of a row are trained: the assistant's turns and their ends, each proved on the row's own tokens.

A labelled row is `input_ids` and `labels` of equal length. A label is the token itself where it is trained, and -100 where it
is not (transformers' convention; the model shifts them by one). Rows are written, tokenised and proved in groups, since the
tokenizer is fast with many texts at once. Knows nothing of files, packing or models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_helpers.base.errors import DataError
from qlora_helpers.data.examples import Example
from qlora_helpers.data.long_rows import shortened, side_of
from qlora_helpers.data.outcome import Outcome
from qlora_helpers.data.plain_templates import Template
from qlora_helpers.data.rendering import Rendering, RowProblem, Span
from qlora_helpers.data.row_proof import NORMALISED, Proved, prove, tokenised

IGNORED = -100
GROUP, GROUP_CHARACTERS = 512, 500_000  # rows that are tokenised at once, and about how many characters of them
_AHEAD = 2  # groups that are tokenised while one is proved
Written = list[tuple[Example, Rendering]]
_MOST_CUTS = 12


@dataclass(frozen=True, eq=False)
class LabelledRow:
    """One row as tokens.

    Attributes:
        id: the row's id; parts of a document that was split have a number behind it.
        ids: `(tokens,)`, int32.
        trained: first token and the one behind the last, of each stretch that is trained.
        answers: the text of each stretch, its end of turn included; empty where every token is trained.
        trimmed_tokens: how many tokens were cut from its prompt.
    """

    id: str
    ids: np.ndarray
    trained: tuple[Span, ...]
    answers: tuple[str, ...] = ()
    trimmed_tokens: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def input_ids(self) -> list[int]:
        """Token ids, `(tokens,)`."""
        return self.ids.tolist()

    @property
    def labels(self) -> list[int]:
        """Labels, `(tokens,)`."""
        found = np.full(len(self.ids), IGNORED, dtype=np.int32)
        for start, end in self.trained:
            found[start:end] = self.ids[start:end]
        return found.tolist()

    @property
    def sequence(self) -> dict[str, Any]:
        """The row as a sequence of its own (`packing`)."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "segment_ids": [1] * len(self),
            "row_ids": [self.id],
        }


@dataclass(frozen=True)
class LabelSettings:
    """How rows are labelled; the fields are those of `DataConfig`, `max_tokens` is its `seq_len_tokens`."""

    loss_on: str = "answer"
    train_on: str = "all_turns"
    long_rows: str = "auto"
    max_tokens: int | None = None


def label_row(
    example: Example,
    template: Template,
    *,
    loss_on: str = "answer",
    train_on: str = "all_turns",
    max_tokens: int | None = None,
    long_rows: str = "auto",
) -> LabelledRow | None:
    """Tokenises, labels and proves one row.

    Args:
        example: the row.
        template: writes it (`templates.make_template`).
        loss_on: `answer` masks the prompt; `all` trains every token but the first, which nothing predicts.
        train_on: `all_turns` or `last_turn` of the assistant.
        max_tokens: a longer row has its prompt cut; answers stay whole.
        long_rows: where it is cut, as in the settings.

    Returns:
        The row, or None where it can't be trained: it is too long without any prompt, or the template can't write it.
    """
    settings = LabelSettings(loss_on, train_on, long_rows, max_tokens)
    return next(label_rows([example], template, settings, Outcome()), None)


def label_rows(
    examples: Iterable[Example], template: Template, settings: LabelSettings, outcome: Outcome
) -> Iterator[LabelledRow]:
    """Tokenises, labels and proves rows, in their order.

    Args:
        examples: the rows.
        template: writes them.
        settings: what is trained, and what happens to long rows.
        outcome: gets a record of what was skipped, cut and masked.

    Raises:
        DataError: a row is longer than `max_tokens`, and `long_rows` is `refuse`.
    """
    ahead: deque[tuple[Written, Future]] = deque()
    with ThreadPoolExecutor(1, "tokenise") as pool:  # the next rows are tokenised while these are proved
        for written in _groups(examples, template, outcome):
            renderings = [rendering for _, rendering in written]
            ahead.append((written, pool.submit(tokenised, renderings, template.encoder)))
            if len(ahead) > _AHEAD:
                yield from _proved(*ahead.popleft(), template, settings, outcome)
        while ahead:
            yield from _proved(*ahead.popleft(), template, settings, outcome)


def _groups(examples: Iterable[Example], template: Template, outcome: Outcome) -> Iterator[Written]:
    """Yields rows with their renderings, as many as are tokenised at once; those that can't be written are skipped."""
    written: Written = []
    characters = 0
    for example in examples:
        try:
            rendering = template.render(example)
        except RowProblem as problem:
            outcome.skipped.append((example.id, example.where, str(problem), ""))
            continue
        written.append((example, rendering))
        characters += len(rendering.text)
        if len(written) == GROUP or characters >= GROUP_CHARACTERS:
            yield written
            written, characters = [], 0
    if written:
        yield written


def _proved(
    written: Written, encoded: Future, template: Template, settings: LabelSettings, outcome: Outcome
) -> Iterator[LabelledRow]:
    made = prove([rendering for _, rendering in written], template.encoder, encoded.result())
    for (example, rendering), each in zip(written, made, strict=True):
        yield from _labelled(example, rendering, each, template, settings, outcome)


def _labelled(
    example: Example,
    rendering: Rendering,
    made: Proved,
    template: Template,
    settings: LabelSettings,
    outcome: Outcome,
) -> Iterator[LabelledRow]:
    excess = len(made.ids) - settings.max_tokens if settings.max_tokens else 0
    cut, shown = 0, ""
    if excess > 0:
        if settings.long_rows == "refuse":
            raise DataError(
                f"{example.where}: the row is longer than a sequence",
                expected=f"at most {settings.max_tokens} tokens",
                got=str(len(made.ids)),
                next_step="Raise data.seq_len_tokens, or set data.long_rows to trim_start, trim_middle, trim_end or drop.",
            )
        if settings.long_rows == "drop":
            outcome.skipped.append((example.id, example.where, "longer than a sequence", f" by {excess} tokens"))
            return
        if example.is_document:
            yield from _document(example, made, settings, outcome)
            return
        fitted = _fitted(example, len(made.ids), template, settings)
        if fitted is None:
            outcome.skipped.append((example.id, example.where, "its answer alone fills the sequence", ""))
            return
        example, rendering, made, cut, shown = fitted
    if example.is_document:
        yield from _document(example, made, settings, outcome)
        return
    row = _conversation(example, rendering, made, settings, cut)
    for _, reason in made.masked:
        outcome.masked[reason] += 1
    if row is None:
        why = made.masked[0][1] if made.masked else "no turn of the assistant is to be trained"
        outcome.skipped.append((example.id, example.where, f"nothing can be trained: {why}", ""))
        return
    outcome.turns += len(row.answers)
    outcome.notes |= dict.fromkeys(rendering.notes) | ({NORMALISED: None} if made.normalised else {})
    if cut:
        outcome.trimmed.append(row.id)
        outcome.cuts.append((example.where, cut, side_of(settings.long_rows, example), shown))
    yield row


def _conversation(
    example: Example, rendering: Rendering, made: Proved, settings: LabelSettings, cut: int
) -> LabelledRow | None:
    pairs = list(zip(made.turns, made.spans, strict=True))
    if settings.train_on == "last_turn":
        last = len(example.messages) - 1
        pairs = [(turn, span) for turn, span in pairs if turn.message == last]
    if not pairs:
        return None
    answers = tuple(rendering.text[turn.start : turn.end] for turn, _ in pairs)
    trained = tuple(span for _, span in pairs) if settings.loss_on != "all" else ((1, len(made.ids)),)
    return LabelledRow(example.id, made.ids, trained, answers, cut)


def _fitted(
    example: Example, length: int, template: Template, settings: LabelSettings
) -> tuple[Example, Rendering, Proved, int, str] | None:
    """Cuts a conversation until it fits; what is left is written, tokenised and proved anew."""
    most, side, shown = settings.max_tokens or length, side_of(settings.long_rows, example), ""
    tokens = length
    for _ in range(_MOST_CUTS):
        found = shortened(example, tokens, most, side, template.encoder)
        if found is None:
            return None
        example, shown = found.example, shown or found.shown
        try:
            rendering = template.render(example)
        except RowProblem:
            return None
        (made,) = prove([rendering], template.encoder)
        tokens = len(made.ids)
        if tokens <= most:
            return example, rendering, made, length - tokens, shown
    return None


def _document(example: Example, made: Proved, settings: LabelSettings, outcome: Outcome) -> Iterator[LabelledRow]:
    """Labels a document, of which every token is trained but the first, in parts where it is too long and may be split."""
    if not made.turns:
        why = made.masked[0][1]
        outcome.skipped.append((example.id, example.where, f"nothing can be trained: {why}", ""))
        return
    outcome.turns += 1
    most, ids = settings.max_tokens or len(made.ids), made.ids
    if len(ids) <= most:
        yield LabelledRow(example.id, ids, ((1, len(ids)),))
        return
    cut = len(ids) - most
    if settings.long_rows in ("auto", "split"):
        outcome.split.append(example.id)
        parts = [ids[start : start + most] for start in range(0, len(ids), most)]
        for number, part in enumerate(parts, start=1):
            if len(part) > 1:
                outcome.unended += [f"{example.id} part {number}"] * (number < len(parts))
                yield LabelledRow(f"{example.id} part {number}", part, ((1, len(part)),))
        return
    side = side_of(settings.long_rows, example)
    head = made.begins
    kept = np.concatenate([ids[:head], ids[cut + head :]]) if side == "start" else ids[:most]
    outcome.unended += [example.id] * (side != "start")
    outcome.trimmed.append(example.id)
    outcome.cuts.append((example.where, cut, "start" if side == "start" else "end", ""))
    yield LabelledRow(example.id, kept, ((1, len(kept)),), trimmed_tokens=cut)
