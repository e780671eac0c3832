"""What the report page says of lm-eval's tasks: a table beside the scorecard. This module imports no torch."""

from __future__ import annotations

from typing import Any

from qlora_helpers.evaluation.scorecard import LEVEL
from qlora_helpers.evaluation.suite_file import cells, read_suite
from qlora_helpers.export.certificate import read_certificate
from qlora_helpers.runs.folder import Run
from qlora_helpers.views.report_scores import percent

INTERVAL = 6  # its place among the cells of a score
MINUS = "\N{MINUS SIGN}"


def suite(run: Run) -> dict[str, Any] | None:
    """Returns the table of lm-eval's tasks as the page lays it out; None if none was asked.

    Returns:
        `caption`, `header` (the task's and the measure's columns apart), `rows` of texts, and `notes`.

    Raises:
        RunError: `suite.json` is damaged.
    """
    found = read_suite(run)
    if found is None:
        return None
    notes = list(found.notes)
    certificate = read_certificate(run.adapter_dir)
    if certificate is None or certificate.weights_sha256 != found.adapter_sha256:
        notes.insert(0, "These are scores of an earlier adapter of this run, not of the one that it has now.")
    if any(score.low is None for score in found.scores):
        notes.append("Without an interval a difference can be chance.")
    return {
        "caption": f"Tasks of lm-eval {found.harness}, in its own units",
        "header": ["Shots", "Rows", "Untuned", "Tuned", f"{percent(LEVEL)} interval"],
        "rows": [
            [cell.replace("-", MINUS) if place == INTERVAL else cell for place, cell in enumerate(cells(score))]
            for score in found.scores
        ],
        "notes": notes,
    }
