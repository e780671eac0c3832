"""Sweeps: planned before anything is written, trained one after another under one budget, stopped, resumed and ranked."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from fake_run import add_evaluation, add_training, fake_run

import qlora_helpers as ql
from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import ConfigError, RunError, UserError
from qlora_helpers.base.files import write_json
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.planning import sweep_cost
from qlora_helpers.runs import sweep as driver
from qlora_helpers.runs.cleanup import delete_run, find_space
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.sweep_file import read_sweep
from qlora_helpers.views.run_list import read_runs, total_line


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(driver, "LOOK_EVERY_S", 0.02)


@pytest.fixture
def base(tmp_path) -> Run:
    return ql.open_run("mine", profile="tiny", root=tmp_path / "runs")


def trained(run: Run) -> None:
    """Leaves in a run's folder what its training and its evaluation leave."""
    add_training(run)
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"")
    add_evaluation(run)


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_a_plan_says_time_and_price_of_all_runs_and_writes_nothing(base):
    base.save_config(base.config().with_settings({"train.usd_per_hour": 3600.0}))
    before = files(base.folder.parent)
    planned = ql.sweep(base, {"adapter.r": [4, 8], "train.learning_rate": [1e-4, "1e-3"]}, budget_hours=2)
    assert [run.name for run in planned.runs] == [
        "mine-r4-learning_rate0.0001",
        "mine-r4-learning_rate0.001",
        "mine-r8-learning_rate0.0001",
        "mine-r8-learning_rate0.001",
    ]
    assert planned.seconds == pytest.approx(sum(cost.seconds for cost in planned.costs)) and planned.seconds > 0
    assert planned.usd == pytest.approx(planned.seconds)
    assert "All together: about" in repr(planned) and f"${planned.usd:,.2f}" in repr(planned)
    assert "The budget is 2 h" in repr(planned) and "mine.sweep: 4 runs of mine, 0 done; not started" in repr(planned)
    assert "less than that" in repr(ql.sweep(base, {"adapter.r": [4, 8]}, budget_hours=1e-6))
    assert files(base.folder.parent) == before


@pytest.fixture
def a10g(monkeypatch):
    """Makes this a machine with an A10G, of 24 GB."""
    monkeypatch.setattr(sweep_cost, "has_gpu", lambda: True)
    monkeypatch.setattr(sweep_cost, "this_machine", lambda price=None: parse_gpus("A10G"))


@pytest.fixture
def large(tmp_path) -> Run:
    """A run of a Llama 8 B; its sequences fit an A10G where they are not too long."""
    settings = ["model.name=meta-llama/Llama-3.1-8B", "data.source=embedded", "data.seq_len_tokens=2048"]
    run = Run(tmp_path / "runs" / "large")
    run.save_config(ql.profile_config("falcon-40b").with_settings(settings))
    return run


def test_a_plan_says_which_runs_fit_and_what_is_too_large_never_starts(large, a10g):
    planned = ql.sweep(large, {"train.micro_batch_size": [1, 64]})
    small, huge = planned.costs
    assert 6 < small.peak_gib < small.usable_gib < huge.peak_gib and not small.is_too_large and huge.is_too_large
    text = repr(planned)
    assert f"{small.peak_gib:.1f} of {small.usable_gib:.1f}" in text
    assert f"{huge.peak_gib:.1f} of {huge.usable_gib:.1f}, too large" in text and "so the sweep can't start" in text
    assert [run["fits"] for run in planned.to_dict()["runs"]] == [True, False]
    before = files(large.folder.parent)
    for begin in (planned.start, planned.write):
        with pytest.raises(
            UserError, match=r"1 of the sweep's 2 runs does not fit; nothing was started; expected at most"
        ):
            begin()
    assert files(large.folder.parent) == before


def test_runs_that_do_not_fit_are_left_out_by_choice(large, a10g, monkeypatch, capsys):
    planned = ql.sweep(large, {"train.micro_batch_size": [1, 2, 64]}, skip_too_large=True)
    assert [run.name for run in planned.runs] == ["large-micro_batch_size1", "large-micro_batch_size2"]
    assert list(planned.skipped) == ["large-micro_batch_size64"] and not planned.too_large
    assert "Left out because they don't fit: large-micro_batch_size64 (" in repr(planned)
    planned.write()
    assert [member.name for member in read_sweep(planned.folder).members] == [run.name for run in planned.runs]
    with pytest.raises(UserError, match="only one of the sweep's 2 runs would be left"):
        ql.sweep(large, {"train.micro_batch_size": [1, 64]}, skip_too_large=True)

    form = ql.sweep_form(large)
    form.names[0].value, form.values[0].value = "train.micro_batch_size", "1, 2, 128"
    form.plan_button.click()
    assert form.start_button.disabled and "too large" in form.shown.value
    form.skip.value = True
    assert form.sweep is None
    form.plan_button.click()
    assert not form.start_button.disabled and "Left out because" in form.shown.value

    monkeypatch.setenv("QLORA_RUNS", str(large.folder.parent))
    values = ["--set", "train.micro_batch_size=1,2,128"]
    assert main(["sweep", "large", *values, "--foreground"]) == 2 and "does not fit" in capsys.readouterr().err
    assert main(["sweep", "large", *values, "--skip-too-large", "--json"]) == 0
    left_out = json.loads(capsys.readouterr().out)["left_out"]
    assert [(run["run"], run["fits"]) for run in left_out] == [("large-micro_batch_size128", False)]


def test_a_plan_for_a_cpu_says_that_it_knows_nothing_of_memory(base):
    planned = ql.sweep(base, {"adapter.r": [4, 8]})
    assert "There is no GPU to train on" in repr(planned) and not planned.too_large
    assert [run["fits"] for run in planned.to_dict()["runs"]] == [None, None]


def test_what_is_no_sweep_is_refused(base):
    for settings, message in (
        ({"adapter.r": [8]}, "2 to 64 runs; got 1"),
        ({"adapter.r": list(range(1, 99))}, "2 to 64 runs; got 98"),
        ({"adapter.r": "8,64"}, "several values"),
        ({"adapter.r": [1, 2], "train.seed": [1, 2], "data.seed": [1, 2]}, "one or two settings"),
        ({"adapter.target_modules": ["query_key_value", "dense"]}, "a list itself"),
    ):
        with pytest.raises(UserError, match=message):
            ql.sweep(base, settings)
    with pytest.raises(ConfigError, match=r"adapter.r: expected at least 1, got 0"):
        ql.sweep(base, {"adapter.r": [0, 8]})
    with pytest.raises(UserError, match="more than nothing"):
        ql.sweep(base, {"adapter.r": [4, 8]}, budget_hours=0)
    with pytest.raises(RunError, match="there is no sweep 'mine.sweep'"):
        ql.sweep(base)


def test_runs_go_one_after_another_and_what_is_done_is_not_done_again(base):
    planned = ql.sweep(base, {"adapter.r": [4, 8, 16]})
    folder = driver.make_sweep(base, planned.file)
    begun = []

    def train(run: Run) -> None:
        assert all(not each.status().is_live for each in planned.runs)
        begun.append(run.name)
        trained(run)

    said: list[str] = []
    assert driver.run_sweep(folder, say=said.append, train=train) == "all 3 runs are done"
    assert begun == ["mine-r4", "mine-r8", "mine-r16"]
    assert [run.config().adapter.r for run in planned.runs] == [4, 8, 16]
    status = ql.sweep("mine", root=base.folder.parent).status()
    assert (status.state, status.step, status.max_steps) == ("finished", 3, 3)
    assert driver.run_sweep(folder, say=said.append, train=train) == "all 3 runs are done" and len(begun) == 3
    rows = {row.name: row for row in read_runs(base.folder.parent)}
    assert list(rows) == ["mine", "mine-r16", "mine-r4", "mine-r8", "mine.sweep"]
    assert rows["mine.sweep"].cells()[1:3] == ["finished 3 of 3", "sweep of mine, 3 runs: r=4,8,16"]
    assert total_line(rows.values()).startswith("4 runs and 1 sweep, ")


def test_a_run_that_fails_does_not_stop_the_others(base):
    planned = ql.sweep(base, {"adapter.r": [4, 8, 16]})
    folder = driver.make_sweep(base, planned.file)

    def train(run: Run) -> None:
        if run.name == "mine-r4":
            raise RunError("out of memory")
        if run.name == "mine-r8":
            run.set_status(state="failed", last_error="the loss exploded")
            return
        trained(run)

    said: list[str] = []
    reason = driver.run_sweep(folder, say=said.append, train=train)
    assert reason == "1 of 3 runs are done; failed: mine-r4, mine-r8"
    assert "mine-r4 failed: out of memory." in said and "mine-r8 failed: the loss exploded." in said
    assert folder.status().state == "finished"


def test_a_request_stops_the_run_that_trains_and_the_sweep_goes_on_later(base, monkeypatch):
    planned = ql.sweep(base, {"adapter.r": [4, 8]})
    folder = driver.make_sweep(base, planned.file)
    asked = []

    def stopped(run: Run, kind: str) -> None:
        asked.append((run.name, kind))
        run.set_status(state="stopped", exit_reason="stopped and saved by request")

    def train(run: Run) -> None:
        run.start_session(max_steps=9, resumed_from=0)  # this very process trains it
        folder.request("stop")
        monkeypatch.setattr(Run, "request", stopped)

    reason = driver.run_sweep(folder, say=lambda text: None, train=train)
    assert asked == [("mine-r4", "stop")]
    assert reason == "stopped and saved by request" and folder.status().state == "stopped"
    assert [request.answer for request in folder.requests] == ["the sweep has ended"]
    assert driver.run_sweep(folder, say=lambda text: None, train=trained) == "all 2 runs are done"


def test_one_budget_counts_for_all_runs_and_sessions(base):
    planned = ql.sweep(base, {"adapter.r": [4, 8]}, budget_hours=1)
    folder = driver.make_sweep(base, planned.file)
    write_json(folder.status_path, {"state": "stopped", "session": 1, "spent_s": 3599.95})

    def train(run: Run) -> None:
        trained(run)
        time.sleep(0.1)

    reason = driver.run_sweep(folder, say=lambda text: None, train=train)
    assert (
        reason.startswith("stopped and saved by its budget: 1 h 00 min of 1 hours")
        and folder.status().state == "stopped"
    )
    assert not planned.runs[1].has_trained()
    with pytest.raises(RunError, match="has used 1 h 00 min of its 1 hours"):
        driver.run_sweep(folder, train=train)
    more = ql.sweep(base, {"adapter.r": [4, 8]}, budget_hours=2)
    assert more.folder.folder == folder.folder
    driver.make_sweep(base, more.file)
    assert driver.run_sweep(folder, say=lambda text: None, train=train) == "all 2 runs are done"


def test_a_run_of_that_name_with_other_settings_is_refused_and_nothing_is_written(base):
    fake_run(base.folder.parent, "mine-r8")
    before = files(base.folder.parent)
    with pytest.raises(RunError, match="there is a run 'mine-r8' already, with other settings"):
        driver.make_sweep(base, ql.sweep(base, {"adapter.r": [4, 8]}).file)
    assert files(base.folder.parent) == before


def test_a_sweep_is_freed_with_its_runs_and_with_no_others(base, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_RUNS", str(base.folder.parent))
    folder = driver.make_sweep(base, ql.sweep(base, {"adapter.r": [4, 8]}).file)
    other = fake_run(base.folder.parent, "other")
    values = json.loads((folder.folder / "sweep.json").read_text())
    strange = [*values["members"], {"name": "other", "settings": {"adapter.r": 1024}}]  # it isn't that run's rank
    write_json(folder.folder / "sweep.json", values | {"members": strange})
    assert main(["clean"]) == 0
    assert "a sweep; clean mine.sweep frees its 2 runs, too" in capsys.readouterr().out
    folder.set_status(state="running", pid=os.getpid())
    assert main(["clean", "mine.sweep", "--yes"]) == 2
    assert "the sweep 'mine.sweep' is running; nothing was freed" in capsys.readouterr().err
    folder.set_status(state="finished", pid=None)
    assert main(["clean", "mine.sweep"]) == 0 and "run:mine-r8/rest" in capsys.readouterr().out
    assert main(["clean", "mine.sweep", "--yes"]) == 0
    assert sorted(path.name for path in base.folder.parent.iterdir()) == ["mine", "other"] and other.exists()


def test_a_run_that_another_sweep_has_too_stays(base):
    first = driver.make_sweep(base, ql.sweep(base, {"adapter.r": [4, 8]}).file)
    second = driver.make_sweep(base, ql.sweep(base, {"adapter.r": [8, 16]}).file)
    assert second.name == "mine-2.sweep"
    with pytest.raises(UserError, match=r"the exact name, mine\.sweep"):
        delete_run(first, name="mine")
    assert delete_run(first, name="mine.sweep") > 0
    assert sorted(path.name for path in base.folder.parent.iterdir()) == ["mine", "mine-2.sweep", "mine-r16", "mine-r8"]
    (second.folder / "sweep.json").write_text("{")
    (row,) = (row for row in read_runs(base.folder.parent) if row.name == second.name)
    assert row.state == "broken" and "sweep.json is damaged" in row.problem
    assert find_space(base.folder.parent).of_run(second.name).items[0].note == "a sweep without runs"


def test_the_list_compares_reports_and_deletes_a_sweep(base, monkeypatch, capsys):
    planned = ql.sweep(base, {"adapter.r": [4, 8]})
    driver.run_sweep(driver.make_sweep(base, planned.file), say=lambda text: None, train=trained)
    panel = ql.list_runs(base.folder.parent)
    assert panel.box and [row.name for row in panel] == ["mine", "mine-r4", "mine-r8"] and len(panel) == 3
    panel.ticks["mine.sweep"].value = True
    enabled = {name for name, each in panel.buttons.items() if not each.disabled}
    assert enabled == {"compare", "report", "delete", "refresh"}
    panel.buttons["compare"].click()
    assert "mine-r4" in panel.below.children[0].value and "adapter.r" in panel.below.children[0].value
    panel.buttons["report"].click()
    assert "<iframe" in panel.below.children[0].value
    panel.buttons["delete"].click()
    assert "go its runs: mine-r4, mine-r8." in panel.note.value
    name, confirm, _ = panel.below.children[0].children
    name.value = "mine.sweep"
    confirm.click()
    assert [path.name for path in base.folder.parent.iterdir() if path.is_dir()] == ["mine"]
    driver.make_sweep(base, planned.file)
    monkeypatch.setenv("QLORA_RUNS", str(base.folder.parent))
    assert main(["compare", "mine.sweep"]) == 0 and "mine-r8" in capsys.readouterr().out


def test_a_sweep_s_file_from_elsewhere_leads_nowhere(base, tmp_path):
    planned = ql.sweep(base, {"adapter.r": [4, 8]})
    folder = driver.make_sweep(base, planned.file)
    path = folder.folder / "sweep.json"
    values = json.loads(path.read_text())
    for names in (["../../x", "b"], ["/etc", "b"], ["a", "a"], []):
        members = [{"name": name, "settings": {}} for name in names]
        write_json(path, values | {"members": members})
        with pytest.raises(RunError, match="damaged"):
            read_sweep(folder)
    write_json(path, values)
    os.symlink(tmp_path, folder.folder / "more")
    with pytest.raises(RunError, match="neither a regular file nor a folder"):
        driver.run_sweep(folder)


def test_a_bucket_of_a_stranger_s_run_is_confirmed_by_no_sweep_and_no_clone(base):
    values = base.config().to_dict()
    values["train"]["tensorboard"] = "s3://theirs/prefix"
    write_json(base.config_path, values)
    with pytest.raises(RunError, match="nobody has named"):
        driver.make_sweep(base, ql.sweep(base, {"adapter.r": [4, 8]}).file)
    with pytest.raises(RunError, match="nobody has named"):
        ql.clone_run(base, "copy")
    assert not (base.folder.parent / "copy").exists()


def test_the_form_plans_what_the_function_plans_and_starts_nothing(base):
    form = ql.sweep_form(base)
    assert form.start_button.disabled
    form.values[0].value, form.names[1].value, form.values[1].value = "4, 8", "train.learning_rate", "1e-4,1e-3"
    form.budget.value = "2"
    form.plan_button.click()
    assert (
        form.sweep.file
        == ql.sweep(base, {"adapter.r": [4, 8], "train.learning_rate": [1e-4, 1e-3]}, budget_hours=2).file
    )
    assert "All together" in form.shown.value and not form.start_button.disabled
    form.values[0].value = "4, no"
    assert form.sweep is None and form.start_button.disabled and form.shown.value == ""
    form.plan_button.click()
    assert "adapter.r: expected a whole number" in form.note.value
    form.values[0].value, form.budget.value = "4, 8", "much"
    form.plan_button.click()
    assert "not a number" in form.note.value
    assert files(base.folder.parent) == {"mine/config.json"}


def test_the_command_line_plans_and_shows(base, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_RUNS", str(base.folder.parent))
    assert main(["sweep", "mine", "--set", "adapter.r=4,8", "--set", "train.learning_rate=1e-4,1e-3"]) == 0
    printed = capsys.readouterr().out
    assert "mine-r8-learning_rate0.001" in printed and "--start does that" in printed
    assert files(base.folder.parent) == {"mine/config.json"}
    assert main(["sweep", "mine"]) == 2 and "there is no sweep" in capsys.readouterr().err
    assert main(["sweep", "mine", "--set", "adapter.r"]) == 2
    driver.make_sweep(base, ql.sweep(base, {"adapter.r": [4, 8]}).file)
    for name in ("mine", "mine.sweep"):
        assert main(["sweep", name, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["state"] == "new" and [run["run"] for run in found["runs"]] == ["mine-r4", "mine-r8"]


@pytest.mark.only_slow
def test_a_real_sweep_survives_a_kill_and_is_stopped_and_resumed(tmp_path, cache):
    settings = ["train.max_steps=400", "train.eval_steps=400", "train.save_steps=400", "data.train_rows=4"]
    settings += ["data.eval_rows=1", "data.test_rows=1", "evaluation.few_shot=0", "evaluation.max_new_tokens=2"]
    base = ql.open_run("mine", profile="tiny", settings=settings, root=tmp_path / "runs")
    sweep = ql.sweep(base, {"adapter.r": [2, 4]}).start()
    first, second = sweep.runs
    until(lambda: any("loss" in line for line in first.progress()))
    pid = sweep.status().pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: sweep.status().state == "dead")
    assert first.status().is_live  # its training goes on
    sweep.resume()
    until(lambda: sweep.status().state == "running")
    sweep.stop()
    until(lambda: sweep.status().state == "stopped")
    assert first.status().state == "stopped" and not second.has_trained()
    for run in sweep.runs:
        run.change_config(run.config().with_settings({"train.max_steps": max(2, run.status().step + 1)}))
    again = ql.sweep("mine", root=tmp_path / "runs").start()
    until(lambda: again.status().state == "finished", 300)
    assert [row.status.state for row in map(_row, again.runs)] == ["finished", "finished"]
    assert all(run.evaluation_path.exists() for run in again.runs)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def _row(run: Run):
    from qlora_helpers.views.run_row import read_row

    return read_row(run.folder)


def until(true, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
