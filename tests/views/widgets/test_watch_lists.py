"""The table of steps and the log below the charts."""

from __future__ import annotations

import base64
import csv
import io
import re

import pytest
from fake_run import STEPS, add_progress, fake_run

from qlora_helpers.views.follow import Follower
from qlora_helpers.views.widgets.run_log import log_html
from qlora_helpers.views.widgets.step_table import FILTERS, MOST_ROWS, csv_link, csv_text, step_rows, table_html

EVIL = "<img src=x onerror=alert(1)>"
LOG = (
    "2026-11-30 18:03:05,978 qlora_helpers.training.train INFO fast step:",
    "on   loss in chunks",
    "2026-11-30 18:03:06,101 qlora_helpers.training.callback INFO step 22: epoch 1, loss 2.1, learning_rate 0.001",
    "2026-11-30 18:03:08,010 qlora_helpers.runs.heartbeat WARNING no space left",
    "2026-11-30 18:03:09,010 qlora_helpers.runs.session ERROR training ended: RunError: no",
    f"  {EVIL}",
)


@pytest.fixture
def view(tmp_path):
    run = fake_run(tmp_path)
    run.start_session(2 * STEPS, 0)
    add_progress(run)
    run.append_progress({"event": "saved", "session": 1, "step": 21})
    return Follower(run).look()


def test_a_row_a_step_with_what_happened_there(view):
    rows = step_rows(view)
    assert [row["step"] for row in rows] == sorted([*range(2, STEPS + 1, 2), 21])
    ten = next(row for row in rows if row["step"] == 10)
    assert {"loss", "eval_loss", "tokens_per_s", "memory_gib"} <= ten.keys()
    assert [row for row in rows if row.get("events")] == [{"step": 21, "events": ["saved"]}, rows[-1]]
    assert rows[-1]["events"] == ["best"]


def test_rows_are_filtered_by_kind_and_by_steps(view):
    assert [row["step"] for row in step_rows(view, FILTERS[1])] == [10, 20, 30]
    assert [row["step"] for row in step_rows(view, FILTERS[2])] == [21, 30]
    assert [row["step"] for row in step_rows(view, FILTERS[1], (15, 25))] == [20]


def test_the_table_shows_the_newest_rows_first_and_only_columns_with_values(view):
    shown = table_html(step_rows(view))
    assert re.findall(r'<th scope="row">(\d+)</th>', shown)[:3] == ["30", "28", "26"]
    assert "GiB" in shown and "load, %" not in shown
    many = [{"step": step, "loss": 2.0} for step in range(1, 501)]
    assert table_html(many).count("<tr>") == MOST_ROWS + 1 and "of 500 rows" in table_html(many)
    assert "no such step" in table_html([])


def test_the_file_holds_every_row_with_all_digits(view):
    rows = step_rows(view)
    link = csv_link(rows, EVIL)
    assert EVIL not in link and "16 rows, up to step 30" in link
    text = base64.b64decode(re.search(r"base64,([^\"]*)", link)[1]).decode()
    assert text == csv_text(rows)
    read = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["step"]) for row in read] == [row["step"] for row in rows]
    assert float(read[0]["loss"]) == rows[0]["loss"]
    assert csv_link([], "demo") == ""


def test_a_value_that_is_no_number_or_formula_never_reaches_the_file(tmp_path):
    run = fake_run(tmp_path)
    run.append_progress({"step": 1, "loss": 2.0, "session": "=1+1", "grad_norm": "@SUM(A1)"})
    assert csv_text(step_rows(Follower(run).look())).splitlines()[1].startswith("1,,")


def lines(shown: str) -> list[str]:
    text = log_html(LOG, shown)
    assert EVIL not in text
    return re.findall(r'<div class="(\w+)">', text)


def test_the_log_shows_levels_and_short_times_and_leaves_steps_to_the_table():
    assert lines("without steps") == ["info", "info", "warning", "error", "error"]
    assert lines("warnings and errors") == ["warning", "error", "error"]
    assert lines("everything") == ["info", "info", "info", "warning", "error", "error"]
    shown = log_html(LOG)
    assert '<time title="2026-11-30 qlora_helpers.runs.heartbeat">18:03:08</time> <b>warning</b> no space left' in shown
    assert "<b>info</b>" not in shown
    assert log_html(()) == ""
    assert "no such line" in log_html(LOG[:1], "warnings and errors")
