"""The page about several runs: their results, what differs in their settings, their order, and their curves, in one file.

This module says what the page contains; `runs_report.html` lays it out. Every text loses its control characters and is escaped by
the template engine.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from qlora_helpers import __version__
from qlora_helpers.base.files import write_text
from qlora_helpers.base.style import stylesheet
from qlora_helpers.base.tables import Table
from qlora_helpers.views.file_links import KeptFile
from qlora_helpers.views.report import template
from qlora_helpers.views.run_comparison import RunComparison

MOST_NAMED = 4


def write_runs_report(comparison: RunComparison, path: Path | None = None) -> Path:
    """Writes the page, whole or not at all.

    Args:
        comparison: what it shows.
        path: where to; None takes `compared-NAME-NAME.html` beside the first run's folder.

    Raises:
        RunError: it can't be written.
    """
    if path is None:
        first = comparison.rows[0].run
        assert first is not None  # it was opened
        names = [row.name for row in comparison.rows]
        more = [f"and-{len(names) - MOST_NAMED}-more"] if len(names) > MOST_NAMED else []
        path = first.folder.parent / ("-".join(["compared", *names[:MOST_NAMED], *more])[:200] + ".html")
    write_text(path, template("runs_report.html").render(_page(comparison)))
    return KeptFile(path)


def _page(comparison: RunComparison) -> dict[str, Any]:
    from markupsafe import Markup

    tables = [comparison.results(), comparison.settings(), comparison.ranking.table()]
    return {
        "style": Markup(stylesheet("colours", "report")),
        "names": comparison.names,
        "version": __version__,
        "sentences": comparison.ranking.sentences(),
        "tables": [{"title": title, **_table(table)} for title, table in zip(TITLES, tables, strict=True)],
        "chart": Markup(comparison.chart.svg("currentColor")),  # made by matplotlib, with the runs' names escaped
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


TITLES = ("Results", "Settings that differ", "Order")


def _table(table: Table) -> dict[str, Any]:
    return {"header": table.header, "rows": table.rows, "caption": table.caption, "numbers": list(table.numbers)}
