"""One row as training will see it, for people to look at: its tokens, and which of its turns are trained, or why they are not.

The tokens are those of `labels`, so what is shown is what is trained. Knows nothing of files or of how a row is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data.examples import Example
from qlora_helpers.data.labels import LabelledRow, LabelSettings, label_rows
from qlora_helpers.data.outcome import Outcome, shown_cut
from qlora_helpers.data.plain_templates import Template
from qlora_helpers.data.rendering import Rendering, RowProblem
from qlora_helpers.data.row_proof import prove


@dataclass(frozen=True)
class SeenRow:
    """A row as training sees it.

    Attributes:
        rows: the labelled row; several where a document is split, none where the row is left out.
        trained: places in the messages of the turns that are trained.
        masked: place in the messages -> why that turn of the assistant is not trained.
        left_out: why the row is not used; empty where it is.
        notes: what was cut or split.
    """

    rows: tuple[LabelledRow, ...] = ()
    trained: frozenset[int] = frozenset()
    masked: Mapping[int, str] = field(default_factory=dict)
    left_out: str = ""
    notes: tuple[str, ...] = ()


def seen_row(example: Example, template: Template, config: DataConfig) -> SeenRow:
    """Labels a row by a run's settings and says which of its turns are trained.

    Args:
        example: the row.
        template: writes it (`templates.template_of`).
        config: what is trained, and what happens to long rows.
    """
    outcome = Outcome()
    settings = LabelSettings(config.loss_on, config.train_on, config.long_rows, config.seq_len_tokens)
    try:
        rows = tuple(label_rows([example], template, settings, outcome))
    except DataError as error:  # too long, and `long_rows` is `refuse`
        return SeenRow(left_out=str(error))
    left_out = "; ".join(f"{kind}{detail}" for _, _, kind, detail in outcome.skipped)
    notes = [f"{tokens:,} tokens were cut" for _, tokens, _, _ in outcome.cuts]
    notes += [f"one cut: {shown}" for shown in [shown_cut(outcome.cuts)] if shown]
    notes += [f"split into {len(rows)} parts; the first is shown"] if len(rows) > 1 else []
    trained, masked = _turns(example, template, config, rows)
    return SeenRow(rows, trained, masked, left_out, (*notes, *outcome.notes))


def _turns(
    example: Example, template: Template, config: DataConfig, rows: tuple[LabelledRow, ...]
) -> tuple[frozenset[int], dict[int, str]]:
    """Returns the turns that are trained, and why others of the assistant are not."""
    if example.is_document:
        return frozenset(), {}
    try:
        rendering: Rendering = template.render(example)
    except RowProblem:
        return frozenset(), {}
    (made,) = prove([rendering], template.encoder)
    proved = [turn.message for turn in made.turns]
    masked = dict(made.masked)
    last = len(example.messages) - 1
    if config.train_on == "last_turn":
        masked |= {place: "only the last turn is trained (data.train_on)" for place in proved if place != last}
        proved = [place for place in proved if place == last]
    kept = len(rows[0].answers) if rows else 0
    cut, trained = proved[: len(proved) - kept], proved[len(proved) - kept :]  # the oldest turns are cut first
    masked |= dict.fromkeys(cut, "it was cut, or its row is left out")
    for place, message in enumerate(example.messages):
        if message.role == "assistant" and not message.learned:
            masked[place] = "the data say that it is not trained"
    return frozenset(trained), masked
