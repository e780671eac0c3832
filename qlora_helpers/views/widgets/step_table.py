"""The logged steps of a run as a table that a person filters and takes away as CSV."""

from __future__ import annotations

import base64
import csv
import html
import io
import time
from collections.abc import Sequence
from typing import Any

from qlora_helpers.views.charts import number_text
from qlora_helpers.views.follow import View
from qlora_helpers.views.readings import as_number, use_of
from qlora_helpers.views.run_plots import DECIMALS

COLUMNS = {
    "loss": "loss",
    "eval_loss": "eval loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "memory_gib": "GiB",
    "load_percent": "load, %",
}
FILTERS = ("all logged steps", "evaluations", "saved, resumed or best")
MOST_ROWS = 100


def step_rows(view: View, shown: str = FILTERS[0], across: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Returns a row for each logged step, oldest first: its values, and under `events` what happened there.

    Args:
        view: the run at one moment.
        shown: one of `FILTERS`.
        across: the first and the last step; None takes all.
    """
    rows: dict[int, dict[str, Any]] = {}
    for record in view.records:
        values = record | use_of(record)
        kept = {
            key: values[key] for key in ("step", "session", "time", *COLUMNS) if as_number(values.get(key)) is not None
        }
        rows.setdefault(record["step"], {}).update(kept)
    for kind, step in view.events:
        rows.setdefault(step, {"step": step}).setdefault("events", []).append(kind)
    first, last = across or (0, float("inf"))
    found = [rows[step] for step in sorted(rows) if first <= step <= last]
    if shown == FILTERS[1]:
        return [row for row in found if "eval_loss" in row]
    return [row for row in found if row.get("events")] if shown == FILTERS[2] else found


def table_html(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the newest rows as a table that scrolls down, never sideways, newest first; columns without a value are left out."""
    if not rows:
        return '<div class="muted">no such step has been logged yet</div>'
    columns = {key: name for key, name in COLUMNS.items() if any(key in row for row in rows)}
    head = "".join(f'<th scope="col">{name}</th>' for name in ("step", *columns.values(), "time", "event"))
    body = "".join(_row(row, columns) for row in reversed(rows[-MOST_ROWS:]))
    more = f"the newest {MOST_ROWS} of {len(rows):,} rows; the CSV file has all" if len(rows) > MOST_ROWS else ""
    return (
        f'<div class="qlora-steps-table" tabindex="0" role="region" aria-label="logged steps"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>" + (f'<div class="muted qlora-note">{more}</div>' if more else "")
    )


def _row(row: dict[str, Any], columns: dict[str, str]) -> str:
    values = "".join(f"<td>{_text(row.get(key), key)}</td>" for key in columns)
    when = time.strftime("%H:%M:%S", time.localtime(row["time"])) if 0 < row.get("time", 0) < 1e11 else ""
    events = html.escape(", ".join(row.get("events", ())))
    return f'<tr><th scope="row">{row["step"]:,}</th>{values}<td>{when}</td><td class="text">{events}</td></tr>'


def _text(value: float | None, key: str) -> str:
    return "" if value is None else f"{value:.{DECIMALS[key]}f}" if key in DECIMALS else number_text(value)


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as CSV, with all digits and times in seconds since 1970."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["step", "session", "time", *COLUMNS, "events"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"events": " ".join(row.get("events", ()))} for row in rows)
    return file.getvalue()


def csv_link(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Returns a link that downloads rows as CSV.

    Args:
        rows: what the file holds.
        name: the run's name.
    """
    if not rows:
        return ""
    data = base64.b64encode(csv_text(rows).encode()).decode()
    count = f"{len(rows):,} row{'s' * (len(rows) != 1)}, up to step {rows[-1]['step']:,}"
    return (
        f'<a class="qlora-download" download="{html.escape(name)}-steps.csv" href="data:text/csv;base64,{data}">Download CSV</a> '
        f'<span class="muted">{count}</span>'
    )
