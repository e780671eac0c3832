"""The log of a run as a panel shows it: lines with short times and levels, without those that the table of steps shows better."""

from __future__ import annotations

import html
from collections.abc import Sequence

from qlora_helpers.views.log_lines import LEVELS, Entry, entries

SHOWN = {"without steps": 20, "warnings and errors": 30, "everything": 0}
"""What can be chosen, and the level from which lines are shown."""


def log_html(lines: Sequence[str], shown: str = "without steps") -> str:
    """Returns the lines as HTML, the newest last; empty without lines.

    Args:
        lines: the last lines of the log.
        shown: a key of `SHOWN`.
    """
    if not lines:
        return ""
    least = SHOWN[shown]
    kept = [entry for entry in entries(lines) if LEVELS[entry.level] >= least and (not least or not entry.is_step)]
    rows = "".join(map(_row, kept)) or '<div class="muted">no such line among the last ones</div>'
    return f'<div class="qlora-tail" tabindex="0" role="region" aria-label="log of the run"><div>{rows}</div></div>'


def _row(entry: Entry) -> str:
    name = "" if entry.level == "INFO" else f"<b>{entry.level.lower()}</b> "
    when = f'<time title="{html.escape(f"{entry.date} {entry.logger}")}">{entry.time}</time> ' if entry.time else ""
    return f'<div class="{entry.level.lower()}">{when}{name}{html.escape(entry.text)}</div>'
