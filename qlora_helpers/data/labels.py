"""Decides which tokens are trained, and reports on it.

A labelled row is `input_ids` and `labels` of equal length. A label is the token itself where it is trained, and -100 where it
is not (transformers' convention; the model shifts them by one). Knows nothing of files, packing or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.data.prompts import answer_tokens, prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class LabelledRow:
    """One dialogue as tokens.

    Attributes:
        id: the row's id.
        input_ids, labels: `(tokens,)` each.
        trimmed_tokens: how many tokens were cut from the end of its dialogue.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    trimmed_tokens: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


def label_row(
    row_id: str,
    dialogue: str,
    summary: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "recipe",
    loss_on: str = "summary",
    max_tokens: int | None = None,
) -> LabelledRow | None:
    """Tokenises and labels one dialogue; the end-of-text token is always trained.

    Args:
        row_id: the row's name in reports.
        dialogue, summary: texts.
        tokenizer: the model's.
        template: `recipe` or `chat`.
        loss_on: `summary` masks the prompt; `all` trains every token but the first, which nothing predicts.
        max_tokens: a longer row has its dialogue trimmed; the summary stays whole.

    Returns:
        The row, or None where it is too long even with an empty dialogue.
    """
    prompt = prompt_tokens(dialogue, template, tokenizer)
    answer = answer_tokens(summary, tokenizer)
    excess = max(0, len(prompt) + len(answer) - max_tokens) if max_tokens else 0
    if excess > len(prompt.dialogue):
        return None
    ids = prompt.trimmed(excess).ids if excess else prompt.ids
    masked = len(ids) if loss_on == "summary" else 1
    tokens = [*ids, *answer]
    return LabelledRow(row_id, tokens, [IGNORED] * masked + tokens[masked:], excess)


@dataclass(frozen=True)
class LabelReport(Tabular):
    """What is trained and what is not, counted over the sequences that the trainer will see.

    Attributes:
        rows, sequences, tokens: how many there are; `tokens` without padding.
        trained_tokens: tokens with a label.
        eos_trained: rows whose end-of-text token has a label.
        prompt_masked: rows in which nothing but the answer has a label.
        answers_whole: rows whose trained answer is exactly their summary.
        trimmed: ids of the rows whose dialogue was cut to fit.
        skipped: ids of the rows that were too long to be used.
        loss_on: `summary` or `all`.
    """

    rows: int
    sequences: int
    tokens: int
    trained_tokens: int
    eos_trained: int
    prompt_masked: int
    answers_whole: int
    trimmed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    loss_on: str = "summary"

    RENAMED: ClassVar[dict[str, str]] = {"left_out": "skipped", "blocks": "sequences"}

    @property
    def problems(self) -> tuple[str, ...]:
        """The reasons why the model would not learn the task; empty where there are none."""
        found = []
        if not self.rows:
            found.append("there is nothing to train on")
        if self.eos_trained < self.rows:
            found.append(
                f"{self.rows - self.eos_trained} rows don't train their end: the model would not learn to stop"
            )
        if self.answers_whole < self.rows:
            found.append(f"{self.rows - self.answers_whole} rows don't train their whole summary")
        if self.loss_on == "summary" and self.prompt_masked < self.rows:
            found.append(f"{self.rows - self.prompt_masked} rows train their prompt: loss is spent on the dialogue")
        return tuple(found)

    @property
    def passed(self) -> bool:
        return not self.problems

    def lines(self) -> list[tuple[str, str]]:
        """Returns the report as pairs of a name and a value."""
        share = 100 * self.trained_tokens / max(1, self.tokens)
        return [
            ("rows", f"{self.rows:,} in {self.sequences:,} sequences"),
            ("tokens", f"{self.tokens:,}"),
            ("trained", f"{self.trained_tokens:,} ({share:.1f} %)"),
            ("end trained", f"{self.eos_trained:,} of {self.rows:,} rows"),
            ("prompt masked", f"{self.prompt_masked:,} of {self.rows:,} rows"),
            ("summary whole", f"{self.answers_whole:,} of {self.rows:,} rows"),
            ("trimmed", _named(self.trimmed)),
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


def label_report(
    sequences: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    summaries: Mapping[str, str],
    loss_on: str = "summary",
    trimmed: Sequence[str] = (),
    skipped: Sequence[str] = (),
) -> LabelReport:
    """Counts what is trained in finished sequences, row by row.

    Args:
        sequences: mappings with `input_ids`, `labels`, `segment_ids` (`(tokens,)` each; rows are numbered from 1, 0 is padding)
            and `row_ids`, the id of each row in the sequence.
        tokenizer: the model's.
        summaries: row id -> the summary that it should train.
        loss_on: as in `label_row`.
        trimmed, skipped: ids to name in the report.
    """
    rows = count = tokens = trained = eos = masked = whole = 0
    for sequence in sequences:
        count += 1
        for number, row_id in enumerate(sequence["row_ids"], start=1):
            where = [i for i, segment in enumerate(sequence["segment_ids"]) if segment == number]
            ids = [sequence["input_ids"][i] for i in where]
            labels = [sequence["labels"][i] for i in where]
            answer = answer_tokens(summaries[row_id], tokenizer)
            start = len(ids) - len(answer)
            rows, tokens = rows + 1, tokens + len(ids)
            trained += sum(label != IGNORED for label in labels)
            eos += bool(labels) and labels[-1] == ids[-1] == tokenizer.eos_token_id
            masked += all(label == IGNORED for label in labels[: max(0, start)])
            whole += start >= 0 and labels[start:-1] == answer[:-1]
    return LabelReport(rows, count, tokens, trained, eos, masked, whole, tuple(trimmed), tuple(skipped), loss_on)
