"""Runs side by side, read from their folders alone: lists, comparisons, the page about several, and folders of strangers."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from fake_run import add_evaluation, evaluation_values, fake_run, finished_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.files import write_json
from qlora_helpers.evaluation.ranking import rank
from qlora_helpers.runs.folder import Run
from qlora_helpers.views.run_comparison import compare_runs
from qlora_helpers.views.run_list import read_runs
from qlora_helpers.views.run_row import COLUMNS, read_row
from qlora_helpers.views.runs_report import write_runs_report

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m"


@pytest.fixture
def root(tmp_path) -> Path:
    """A finished run, one of another rank that took longer and cost more, one that is new, and three broken folders."""
    finished_run(tmp_path, "small")
    large = finished_run(tmp_path, "large")
    large.save_config(large.config().with_settings({"adapter.r": 64}))
    spent = {"spent_s": 600.0, "spent_usd": 2.5, "usd_per_hour": 1.0, "heartbeat": 1_767_312_000.0}
    write_json(large.status_path, json.loads(large.status_path.read_text()) | spent)
    fake_run(tmp_path, "new")
    finished_run(tmp_path, "damaged").status_path.write_text("{")
    (tmp_path / "no-settings").mkdir()
    (tmp_path / "no-settings" / "status.json").write_text("{}")
    (tmp_path / f"bad {HOSTILE.replace('/', '')}").mkdir()
    (tmp_path / f"bad {HOSTILE.replace('/', '')}" / "config.json").write_text("{}")
    (tmp_path / "not-a-run").mkdir()
    return tmp_path


def test_every_run_is_a_row_and_a_broken_folder_says_what_is_wrong(root):
    rows = {row.name: row for row in read_runs(root)}
    assert set(rows) == {"small", "large", "new", "damaged", "no-settings", "bad <img src=x onerror=alert(1)>"}
    large = dict(zip(COLUMNS, rows["large"].cells(), strict=True))
    assert large["state"] == "finished 30 of 30" and large["changed settings"].startswith("r=64, ")
    assert (large["best loss"], large["minutes"], large["USD"]) == ("2.229", "10.0", "2.50")
    assert large["score"] == "ROUGE-L 27.3, +18.1" and large["date"].startswith("2026-01-0")
    assert "r=" not in rows["small"].changes
    assert rows["new"].state == "new" and rows["new"].cells()[5] == ""
    assert "status.json is damaged" in rows["damaged"].problem and rows["damaged"].best_loss is not None
    assert "config.json is missing" in rows["no-settings"].problem
    assert "can't be that of a run" in rows["bad <img src=x onerror=alert(1)>"].problem


def test_nothing_of_a_run_s_texts_is_ever_markup_or_a_terminal_code(root):
    run = fake_run(root, "hostile")
    values = run.config().to_dict()
    values["data"]["source"] = "<img src=x onerror=alert(1)>"
    write_json(run.config_path, values)
    shown = read_runs(root)
    page = write_runs_report(compare_runs("hostile", "small", root=root)).read_text()
    for text in (shown._repr_html_(), compare_runs("hostile", "small", root=root)._repr_html_(), page):
        assert "<img src=x" not in text and "\x1b" not in text
    assert "\x1b" not in repr(shown)


def test_a_link_in_a_run_s_folder_is_a_broken_row(root):
    os.symlink("/etc", root / "small" / "data" / "more")
    assert "neither a regular file nor a folder" in read_row(root / "small").problem


def test_sorting_puts_runs_without_a_value_last_and_refuses_other_columns(root):
    runs = read_runs(root)
    assert [row.name for row in runs.sorted_by("minutes", descending=True)][0] == "large"
    by_date = [row.date for row in runs.sorted_by("date") if row.date]
    assert by_date == sorted(by_date, reverse=True)
    scored = runs.sorted_by("score").rows
    assert all(row.score for row in scored[:3]) and not any(row.score for row in scored[3:])
    assert [row.name for row in runs.reversed()] == [row.name for row in runs][::-1]
    with pytest.raises(UserError, match="changed settings"):
        runs.sorted_by("colour")


def test_a_filter_takes_words_and_settings_that_were_not_changed(root):
    runs = read_runs(root)
    assert [row.name for row in runs.where("r=64 finished")] == ["large"]
    assert [row.name for row in runs.where("adapter.r=8 finished")] == ["small"]
    assert "5 runs are left out by the filter" in repr(runs.where("r=64"))
    assert repr(runs.where("r=63")).startswith("no run fits the filter")
    assert repr(read_runs(root / "nowhere")) == "no runs yet"


def scored(seed: int, mean: float, rows: int = 60) -> dict:
    """An `evaluation.json` whose tuned answers have a ROUGE-L around a mean; the same rows for every seed."""
    noise, own = random.Random(0), random.Random(seed)
    values = evaluation_values(2)
    shown = []
    for number in range(rows):
        level = noise.gauss(0, 12)  # some rows are harder, for every run
        score = mean + level + own.gauss(0, 3)
        answer = {"text": "t", "tokens": 1, "stopped": True, "rouge_l": score}
        row = {"id": f"row-{number}", "dialogue": f"d{number}", "summary": "s", "answers": {"tuned": answer}}
        shown.append(row)
    return values | {"rows": shown}


def test_a_ranking_tells_apart_what_pairs_of_rows_tell_apart_and_nothing_else():
    found = rank({"low": scored(1, 30), "best": scored(2, 36), "near": scored(3, 35.5)})
    assert [place.name for place in found.places] == ["best", "near", "low"]
    assert found.apart == {("best", "low"), ("near", "low")}
    first = found.sentences()[0]
    assert "best has the best ROUGE-L" in first and "better than low" in first and "can't tell it from near" in first
    # the interval of one run alone is far wider than the difference that pairs show
    low = found.places[2]
    assert low.high - low.low > 4 and low.behind.low > 2
    assert found.level == pytest.approx(1 - 0.05 / 3) and "confirm it on other rows" in found.sentences()[1]


def test_what_can_t_be_compared_is_said_and_not_ranked():
    few = rank({"a": scored(1, 30, rows=10), "b": scored(2, 60, rows=10)})
    assert "10 rows are too few" in few.sentences()[0] and not few.apart
    other = scored(2, 40)
    other["rows"] = [row | {"dialogue": "another"} for row in other["rows"]]
    assert "different rows" in " ".join(rank({"a": scored(1, 30), "b": other}).sentences())
    chance = rank({"a": scored(1, 30), "b": scored(2, 40) | {"random_weights": True}, "c": {}})
    assert not chance.apart and len(chance.places) == 1
    assert "b has random weights" in " ".join(chance.remarks) and "c is not evaluated yet." in chance.remarks
    spoilt = scored(1, 30)
    spoilt["rows"][3]["answers"]["tuned"]["rouge_l"] = "much"
    assert "damaged" in " ".join(rank({"a": spoilt, "b": scored(2, 30)}).sentences())


def test_a_comparison_shows_what_differs_and_lays_the_curves_over_one_another(root):
    for name, values in (("small", scored(1, 30)), ("large", scored(2, 40))):
        add_evaluation(Run(root / name), rows=values["rows"])
    found = compare_runs("small", Run(root / "large"), "new", root=root)
    assert found.setting_differences() == {"adapter.r": [8, 64, 8]}
    assert "large has the best ROUGE-L" in repr(found) and "new is not evaluated yet." in repr(found)
    curves = found.chart.panels
    assert [panel.title for panel in curves] == ["evaluation loss, nats per token", "training loss, nats per token"]
    assert set(curves[0].lines) == {f"{name}, evaluation loss" for name in ("small", "large", "new")}
    assert found._repr_html_().count("<img ") == 1
    with pytest.raises(UserError, match="two runs or more"):
        compare_runs("small", "small", root=root)
    with pytest.raises(UserError, match="there is no run 'gone'"):
        compare_runs("small", "gone", root=root)


def test_a_damaged_run_can_be_compared_and_says_what_is_wrong(root):
    text = repr(compare_runs("small", "damaged", root=root))
    assert "status.json is damaged" in text and "settings are the same" in text


def test_the_command_line_prints_the_same_and_writes_a_page(root, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_RUNS", str(root))
    assert main(["list", "--sort", "score"]) == 0
    printed = capsys.readouterr().out
    assert repr(read_runs(root).sorted_by("score")) in printed and "6 runs, 20 min" not in printed
    assert main(["list", "--json", "--where", "large"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert (row["run"], row["changed"]["adapter.r"], row["usd"]) == ("large", 64, pytest.approx(2.5, abs=0.1))
    assert main(["compare", "small", "large"]) == 0
    assert capsys.readouterr().out.strip() == repr(compare_runs("small", "large", root=root)).strip()
    assert main(["report", "small", "large"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == root / "compared-small-large.html"
    page = path.read_text()
    assert "adapter.r" in page and "<svg " in page and "<script" not in page
    assert main(["list", "--sort", "colour"]) == 2
    assert main(["compare", "small"]) == 2


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=anything, file=st.sampled_from(["config.json", "status.json", "evaluation.json", "progress.jsonl"]))
def test_a_row_comes_of_every_content_of_a_run_s_files(tmp_path, values, file):
    folder = tmp_path / "runs" / "theirs"
    if not folder.exists():
        finished_run(tmp_path / "runs", "theirs")
    before = (folder / file).read_bytes()
    (folder / file).write_text(json.dumps(values), encoding="utf-8")
    row = read_row(folder)
    assert len(row.cells()) == len(COLUMNS) and not any("\n" in cell for cell in row.cells())
    repr(compare_runs(Run(folder), Run(folder.parent / "other"))) if (folder.parent / "other").exists() else None
    (folder / file).write_bytes(before)
