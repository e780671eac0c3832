"""The panel that lists runs, without a browser."""

from __future__ import annotations

import pytest
from fake_run import fake_run, finished_run

import qlora_helpers as ql
from qlora_helpers.runs.folder import Run


@pytest.fixture
def panel(tmp_path):
    finished_run(tmp_path, "a")
    b = finished_run(tmp_path, "b")
    b.save_config(b.config().with_settings({"adapter.r": 64}))
    fake_run(tmp_path, "c")
    panel = ql.list_runs(tmp_path)
    assert "box" not in panel.__dict__  # printing it makes no widget
    panel.box  # noqa: B018
    return panel


def tick(panel, *names):
    for name, box in panel.ticks.items():
        box.value = name in names


def test_it_is_a_table_where_there_are_no_widgets(panel):
    assert repr(panel) == repr(panel.runs) and panel.still_html().startswith("<table")
    assert [row.name for row in panel] == ["a", "b", "c"] and len(panel) == 3


def test_sorting_and_filtering_redraw_the_rows_and_keep_what_is_ticked(panel):
    tick(panel, "a", "b")
    panel.filter.value = "r=64"
    assert list(panel.ticks) == ["b"] and [run.name for run in panel.ticked] == ["b"]
    panel.filter.value = ""
    assert [run.name for run in panel.ticked] == ["a", "b"]
    panel.reverse.value = True
    assert list(panel.ticks) == ["c", "b", "a"]
    assert panel.buttons["delete"].disabled and not panel.buttons["compare"].disabled


def test_ticked_runs_are_compared_and_reported(panel, tmp_path):
    tick(panel, "a", "b")
    panel.buttons["compare"].click()
    (shown,) = panel.below.children
    assert "adapter.r" in shown.value and "<img " in shown.value
    panel.buttons["report"].click()
    assert (tmp_path / "compared-a-b.html").exists()
    tick(panel, "a")
    panel.buttons["report"].click()
    (page,) = panel.below.children
    assert 'sandbox=""' in page.value and "report.html" in panel.note.value
    panel.buttons["watch"].click()
    watching = panel._watching
    assert watching.run.name == "a" and panel.below.children == (watching.box,)
    panel.buttons["report"].click()
    assert watching.closed and panel._watching is None


def test_a_run_is_cloned_under_a_new_name_only(panel, tmp_path):
    tick(panel, "b")
    panel.buttons["clone"].click()
    name, confirm, _ = panel.below.children[0].children
    name.value = "a"
    confirm.click()
    assert "there is a run &#x27;a&#x27; already" in panel.note.value
    name.value = "../x"
    confirm.click()
    assert "already" in panel.note.value or "name of a run" in panel.note.value
    name.value = "b-again"
    confirm.click()
    assert Run(tmp_path / "b-again").config() == Run(tmp_path / "b").config()
    assert "b-again" in panel.ticks and not Run(tmp_path / "b-again").has_trained()


def test_a_run_is_deleted_once_its_exact_name_is_typed(panel, tmp_path):
    tick(panel, "b")
    panel.buttons["delete"].click()
    name, confirm, _ = panel.below.children[0].children
    for wrong in ("", "B", "b ", "a"):
        name.value = wrong
        confirm.click()
        assert (tmp_path / "b" / "config.json").exists() and "nothing was deleted" in panel.note.value
    name.value = "b"
    confirm.click()
    assert not (tmp_path / "b").exists() and list(panel.ticks) == ["a", "c"]


def test_a_run_that_trains_is_not_deleted(panel, tmp_path):
    Run(tmp_path / "c").start_session(max_steps=9, resumed_from=0)
    tick(panel, "c")
    panel.buttons["delete"].click()
    name, confirm, _ = panel.below.children[0].children
    name.value = "c"
    confirm.click()
    assert "is running" in panel.note.value and (tmp_path / "c" / "config.json").exists()
