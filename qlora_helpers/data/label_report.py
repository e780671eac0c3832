"""Reports what is trained, counted over the finished sequences that the trainer will see. Knows nothing of files or models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.data.encoding import Decoder
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.data.row_proof import same_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 256  # sequences whose trained tokens are decoded together


@dataclass(frozen=True)
class LabelReport(Tabular):
    """What is trained and what is not, counted over the sequences that the trainer will see.

    Attributes:
        rows, sequences, tokens: how many there are; `tokens` without padding.
        trained_tokens: tokens with a label.
        ends_trained: rows whose last trained token is the end of a turn or of the text.
        prompt_masked: rows in which nothing but answers has a label.
        answers_whole: rows whose trained tokens are exactly their answers.
        trimmed: ids of the rows whose prompt was cut to fit.
        skipped: ids of the rows that are not used.
        loss_on: `answer` or `all`.
        turns, masked_turns: turns of the assistant that are trained, and that are not though they should be.
        trimmed_tokens: how many tokens were cut.
        shown_cut: one cut, with what comes before it and after it.
    """

    rows: int
    sequences: int
    tokens: int
    trained_tokens: int
    ends_trained: int
    prompt_masked: int
    answers_whole: int
    trimmed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    loss_on: str = "answer"
    turns: int = 0
    masked_turns: int = 0
    trimmed_tokens: int = 0
    shown_cut: str = ""

    RENAMED: ClassVar[dict[str, str]] = {
        "left_out": "skipped",
        "blocks": "sequences",
        "eos_trained": "ends_trained",
    }

    @property
    def problems(self) -> tuple[str, ...]:
        """The reasons why the model would not learn the task; empty where there are none."""
        found = []
        if not self.rows:
            found.append("there is nothing to train on")
        if self.ends_trained < self.rows:
            found.append(
                f"{self.rows - self.ends_trained} rows don't train their end: the model would not learn to stop"
            )
        if self.answers_whole < self.rows:
            found.append(f"{self.rows - self.answers_whole} rows don't train their whole answer")
        if self.loss_on != "all" and self.prompt_masked < self.rows:
            found.append(
                f"{self.rows - self.prompt_masked} rows train their prompt: loss is spent on what the user wrote"
            )
        return tuple(found)

    @property
    def passed(self) -> bool:
        return not self.problems

    def lines(self) -> list[tuple[str, str]]:
        """Returns the report as pairs of a name and a value."""
        share = 100 * self.trained_tokens / max(1, self.tokens)
        turns = [("turns trained", f"{self.turns:,} of {self.turns + self.masked_turns:,}")] if self.turns else []
        cut = [("one cut", self.shown_cut)] if self.shown_cut else []
        tokens = f", {self.trimmed_tokens:,} tokens in all" if self.trimmed_tokens else ""
        return [
            ("rows", f"{self.rows:,} in {self.sequences:,} sequences"),
            ("tokens", f"{self.tokens:,}"),
            ("trained", f"{self.trained_tokens:,} ({share:.1f} %)"),
            *turns,
            ("end trained", f"{self.ends_trained:,} of {self.rows:,} rows"),
            ("prompt masked", f"{self.prompt_masked:,} of {self.rows:,} rows"),
            ("answer whole", f"{self.answers_whole:,} of {self.rows:,} rows"),
            ("trimmed", _named(self.trimmed) + tokens),
            *cut,
            ("skipped", _named(self.skipped)),
            ("verdict", "PASS" if self.passed else "FAIL: " + "; ".join(self.problems)),
        ]

    def table(self) -> Table:
        """Returns the lines of the report as pairs of a name and a value."""
        return Table((), self.lines())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, including the verdict."""
        return dict(vars(self)) | {"passed": self.passed, "problems": list(self.problems)}


def _named(ids: Sequence[str], most: int = 5) -> str:
    if not ids:
        return "none"
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return f"{len(ids)}: {', '.join(ids[:most])}{more}"


@dataclass(frozen=True)
class _Row:
    """A row of a sequence: its stretches of labels, and what they should be."""

    ids: np.ndarray
    labels: np.ndarray
    answers: Sequence[str]
    starts: list[int]
    ends: list[int]

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields what is to be decoded of each stretch: the token before it, and its labels."""
        for start, end in zip(self.starts, self.ends, strict=True):
            yield self.ids[max(0, start - 1) : start], self.labels[start:end]


def label_report(
    sequences: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    answers: Mapping[str, Sequence[str]],
    loss_on: str = "answer",
    unended: Iterable[str] = (),
    **more: Any,
) -> LabelReport:
    """Counts what is trained in finished sequences, row by row, by decoding it.

    Args:
        sequences: mappings with `input_ids`, `labels`, `segment_ids` (`(tokens,)` each; rows are numbered from 1, 0 is padding)
            and `row_ids`, the id of each row in the sequence.
        tokenizer: the model's.
        answers: row id -> the texts that it should train, each with its end; empty for a row that trains every token.
        loss_on: as in `labels.label_row`.
        unended: ids of rows without an end of their own: parts of a document, and documents whose end was cut.
        more: further fields of the report.
    """
    rows = count = tokens = trained = ended = masked = whole = 0
    without_end, remaining, decoder = set(unended), iter(sequences), Decoder(tokenizer.backend_tokenizer)
    end_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    end_texts = tuple(str(token.content) for token in tokenizer.added_tokens_decoder.values())
    while group := list(islice(remaining, _AT_ONCE)):
        count += len(group)
        found = [(row_id, row) for each in group for row_id, row in _rows(each, answers)]
        texts = iter(decoder.pairs([piece for _, row in found for piece in row.pieces()]))
        for row_id, row in found:
            stretches = [next(texts) for _ in row.starts]
            rows, tokens = rows + 1, tokens + len(row.ids)
            trained += sum(row.ends) - sum(row.starts)
            ended += row_id in without_end or (bool(row.ends) and int(row.labels[row.ends[-1] - 1]) in end_ids)
            is_masked, is_whole = _judged(row, stretches, loss_on, end_texts)
            masked, whole = masked + is_masked, whole + is_whole
    return LabelReport(rows, count, tokens, trained, ended, masked, whole, loss_on=loss_on, **more)


def _rows(sequence: Mapping[str, Any], answers: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, _Row]]:
    ids, labels = np.asarray(sequence["input_ids"]), np.asarray(sequence["labels"])
    segments = np.asarray(sequence["segment_ids"])
    if (segments[1:] < segments[:-1]).any():  # rows that do not follow each other, or padding behind them
        order = np.argsort(segments, kind="stable")
        ids, labels, segments = ids[order], labels[order], segments[order]
    numbers = np.arange(1, len(sequence["row_ids"]) + 1)
    first, last = np.searchsorted(segments, numbers), np.searchsorted(segments, numbers, side="right")
    for number, row_id in enumerate(sequence["row_ids"]):
        own_ids, own_labels = ids[first[number] : last[number]], labels[first[number] : last[number]]
        is_trained = np.zeros(len(own_labels) + 2, dtype=bool)
        np.not_equal(own_labels, IGNORED, out=is_trained[1:-1])
        marks = np.flatnonzero(is_trained[1:] != is_trained[:-1])
        yield str(row_id), _Row(own_ids, own_labels, answers[row_id], marks[0::2].tolist(), marks[1::2].tolist())


def _judged(row: _Row, stretches: Sequence[tuple[str, str]], loss_on: str, ends: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether nothing but answers has a label, and whether the answers have them whole; their ends are judged by themselves."""
    if not row.answers or loss_on == "all":
        every = len(row.ids) > 0 and bool((row.labels[1:] == row.ids[1:]).all())
        return (not row.answers, every)
    matched = len(stretches) == len(row.answers) and all(
        any(same_text(together, before, answer))
        for (together, before), answer in zip(stretches, row.answers, strict=True)
    )
    if matched:
        return True, True
    texts = [together[len(before) :] if together.startswith(before) else together for together, before in stretches]
    inside = all(any(text in answer for answer in row.answers) for text in texts)
    outside = sum(map(len, texts)) > sum(map(len, row.answers))
    bare = [_without_end(answer, ends) for answer in row.answers]
    whole = all(any(answer in text for text in texts) for answer in bare)
    return inside and not outside, whole


def _without_end(answer: str, ends: tuple[str, ...]) -> str:
    return next((answer.removesuffix(end) for end in ends if end and answer.endswith(end)), answer)
