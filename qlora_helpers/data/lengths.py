"""Measures how long rows are as tokens, before a run is set up: what decides the sequence length and the longest answer.

Rows are written, tokenised and proved as in training, so the lengths are those that training sees. Knows nothing of weights,
hardware or files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_helpers.data.examples import Example
from qlora_helpers.data.labels import LabelSettings, label_rows
from qlora_helpers.data.outcome import Outcome, outcome_notes
from qlora_helpers.data.plain_templates import Template

MOST_MEASURED = 5000  # rows; of more, a sample by a seed is measured
MOST_NOTES = 5


@dataclass(frozen=True)
class RowLengths:
    """Lengths of training rows.

    Attributes:
        rows: training rows, those that can't be trained left out (estimated where a sample was measured).
        totals: tokens of each measured row, ascending.
        prompts: tokens before the last answer of each measured conversation, ascending; empty for documents.
        answers: tokens of the last answer of each measured conversation, its end included, ascending; empty for documents.
        trained: tokens of the measured rows that are trained.
        notes: what a person should know about how these rows are written.
    """

    rows: int
    totals: tuple[int, ...]
    prompts: tuple[int, ...]
    answers: tuple[int, ...]
    trained: int
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> int:
        """How many rows were measured."""
        return len(self.totals)

    @property
    def tokens(self) -> int:
        """Tokens of all training rows."""
        return round(sum(self.totals) * self.rows / max(1, self.measured))

    @property
    def trained_share(self) -> float:
        """Share of the tokens that are trained."""
        return self.trained / max(1, sum(self.totals))


def covering(lengths: Sequence[int], share: float) -> int:
    """Returns the smallest length that at least this share of the rows does not exceed; 0 where there are none.

    Args:
        lengths: ascending.
        share: of the rows, above 0 and at most 1.
    """
    return lengths[max(0, math.ceil(share * len(lengths) - 1e-9) - 1)] if lengths else 0


def row_lengths(rows: Sequence[Example], template: Template, *, loss_on: str, train_on: str, seed: int) -> RowLengths:
    """Measures training rows at their full length.

    Args:
        rows: the training rows.
        template: writes them.
        loss_on, train_on: what is trained, as in the settings.
        seed: of the sample, where there are more than `MOST_MEASURED` rows.
    """
    chosen = rows
    if len(rows) > MOST_MEASURED:
        chosen = [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), MOST_MEASURED))]
    outcome, totals, trained = Outcome(), [], 0
    prompts, answers = [], []
    documents = {row.id for row in chosen if row.is_document}
    for row in label_rows(chosen, template, LabelSettings(loss_on, train_on, "auto", None), outcome):
        totals.append(len(row))
        trained += sum(end - start for start, end in row.trained)
        if row.id in documents:
            continue
        # Where every token is trained, the answer's own place is not kept: its text is tokenised instead.
        start, end = row.trained[-1]
        answer = end - start if loss_on == "answer" else len(template.encoder.plain([row.answers[-1]])[0].ids)
        prompts.append(len(row) - answer)
        answers.append(answer)
    usable = round(len(rows) * len(totals) / len(chosen)) if chosen else 0
    return RowLengths(
        usable,
        tuple(sorted(totals)),
        tuple(sorted(prompts)),
        tuple(sorted(answers)),
        trained,
        tuple(outcome_notes(outcome, MOST_NOTES)),
    )
