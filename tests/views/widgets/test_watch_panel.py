"""What the widgets of the watch panel contain, without a browser; the browser tests check how they look."""

from __future__ import annotations

import asyncio
import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from fake_run import STEPS, add_progress, fake_run

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import write_json
from qlora_helpers.runs.folder import Run
from qlora_helpers.views.widgets import live_charts, watch

GPUS = {
    "gpus": [
        {"name": "NVIDIA A10G", "memory_used_gib": 18.25, "memory_total_gib": 24.0, "load": 97.0},
        {"name": "NVIDIA A10G", "memory_used_gib": 3.0, "memory_total_gib": 24.0, "load": None},
    ]
}


def live_run(tmp_path, **changes) -> Run:
    """A run whose folder says that this process trains it."""
    run = fake_run(tmp_path)
    run.start_session(max_steps=2 * STEPS, resumed_from=0)
    add_progress(run)
    now = time.time()
    status = {"step": STEPS, "started_at": now - 90, "heartbeat": now, "usd_per_hour": 7.2} | changes
    write_json(run.status_path, dataclasses.replace(run.status(), **status))
    return run


def drawn(panel) -> list[list[list]]:
    """The points of each line of each chart, as the page has them for the pointer."""
    return [json.loads(html.unescape(data)) for data in re.findall('data-lines="([^"]*)"', panel.charts.box.value)]


def keys_of(panel) -> list[str]:
    """The latest values, as the charts' keys show them."""
    return re.findall('<b data-last="([^"]*)">', panel.charts.box.value)


def steps(line) -> list[int]:
    return [step for step, _ in line]


def last_step(panel) -> int:
    """The last step of the training loss that is drawn."""
    return drawn(panel)[0][0][-1][0]


def shown_lines(panel) -> list[str]:
    """The lines of the log."""
    return [line for line in plain_text(panel.log).split("\n") if line]


def plain_text(widget) -> str:
    return html.unescape(re.sub("<[^>]*>", "\n", widget.value))


def test_values_of_a_run_that_trains(tmp_path):
    run = live_run(tmp_path, readings=GPUS)
    panel = watch(run)
    assert 'aria-valuenow="30"' in panel.bar.value and "width:50.0%" in panel.bar.value
    assert {"demo", "running", "training", "30 of 60", "about 4 min 00 s", "1 min 30 s, 0.18 USD"} <= {
        line.strip() for line in plain_text(panel.state).splitlines()
    }
    (losses, learning_rate, norm, speed, memory, load), keys = drawn(panel), keys_of(panel)
    assert steps(losses[0]) == [*range(2, STEPS + 1, 2)]
    assert steps(losses[1]) == [10, 20, 30]
    for (line,) in (learning_rate, norm, speed, memory):
        assert len(line) == STEPS / 2 + (line is memory[0]) * 3  # lines of evaluations have readings, too
    assert load == [[]]
    assert "850" in keys
    shown = plain_text(panel.readings).split("\n")
    assert {"GPU 0 NVIDIA A10G memory", "18.2 of 24 GiB", "GPU 0 load", "97 %", "3.0 of 24 GiB"} <= set(shown)
    assert "GPU 1 load" not in shown
    assert panel.readings.value.count("full") == 0  # a busy GPU is no warning
    assert not panel.stop_button.disabled
    assert not panel.save_button.disabled
    assert panel.resume_button.disabled
    panel.close()


def test_new_steps_are_drawn_and_superseded_ones_go(tmp_path):
    run = live_run(tmp_path)
    panel = watch(run)
    run.append_progress({"session": 1, "step": 32, "loss": 2.0})
    panel.refresh()
    assert steps(drawn(panel)[0][0])[-2:] == [30, 32]
    run.append_progress({"event": "start", "session": 2, "resumed_from": 20})
    run.append_progress({"session": 2, "step": 22, "loss": 1.0})
    panel.refresh()
    assert drawn(panel)[0][0][-1] == [22, "1.000"] and steps(drawn(panel)[0][0])[-2:] == [20, 22]
    assert steps(drawn(panel)[0][1]) == [10, 20]
    assert panel.view.events == (("resumed", 20), ("best", 20))
    assert 'title="resumed at step 20"' in panel.charts.box.value
    panel.close()


def test_points_already_drawn_are_not_sent_again(tmp_path):
    run = live_run(tmp_path)
    panel = watch(run)
    sent = []
    for widget in (panel.charts.box, panel.steps, panel.csv, panel.log, panel.bar):
        widget.observe(sent.append)
    panel.refresh()
    assert sent == []
    run.append_progress({"session": 1, "step": 32, "loss": 2.0})
    panel.refresh()
    assert {change["owner"] for change in sent} >= {panel.charts.box, panel.steps}
    panel.close()


def test_a_half_written_line_waits_for_its_end(tmp_path):
    run = live_run(tmp_path)
    panel = watch(run)
    line = json.dumps({"session": 1, "step": 32, "loss": 2.0})
    with open(run.progress_path, "a") as file:
        file.write(line[:15])
        file.flush()
        panel.refresh()
        assert last_step(panel) == 30
        file.write(line[15:] + "\n")
    panel.refresh()
    assert last_step(panel) == 32
    panel.close()


EVIL = "<img src=x onerror=alert(1)> & <script>alert(2)</script>"


def test_html_in_what_is_read_is_shown_and_not_run(tmp_path):
    run = live_run(tmp_path, readings={"gpus": [{"name": EVIL, "memory_used_gib": 1.0}]})
    run.log_path.write_text(f"first\n{EVIL}\n\x1b[31mred\x1b[0m\n")
    request = run.request("save")
    run.requests.acknowledge(request, EVIL)
    panel = watch(run)
    run.set_status(state="failed", last_error=EVIL)
    panel.refresh()
    for widget in (panel.state, panel.log, panel.requests, panel.readings):
        assert "<img" not in widget.value and "<script" not in widget.value
        assert EVIL in plain_text(widget)
    assert "red" in panel.log.value and "\x1b" not in panel.log.value
    assert "<img src=x" not in panel.still_html() and "<script" not in panel.still_html()
    panel.close()


@pytest.mark.parametrize(
    "readings",
    [{"gpus": 3}, {"gpus": [None, "x", {"load": "hot", "memory_used_gib": True}]}, {"process": {"rss_gib": "2"}}],
)
def test_malformed_readings_are_skipped(tmp_path, readings):
    run = live_run(tmp_path, readings=readings)
    run.append_progress({"session": 1, "step": 32, "time": "noon", "loss": 10**400, "evaluations_without_better": []})
    run.save_config(run.config().with_settings({"train.patience": 4}))
    panel = watch(run)
    assert panel.readings.value == ""
    assert last_step(panel) == 30
    assert "0 of 4" in plain_text(panel.limits)
    panel.close()


def test_a_bar_in_the_log_is_shown_as_it_was_last(tmp_path):
    run = live_run(tmp_path)
    run.log_path.write_bytes(b"begin\nLoading:   0%\rLoading:  50%\rLoading: 100%\r\nafter \xff\n")
    panel = watch(run)
    assert shown_lines(panel) == ["begin", "Loading: 100%", "after \ufffd"]
    run.log_path.write_text("".join(f"line {number}\n" for number in range(10_000)))
    panel.refresh()
    assert shown_lines(panel) == [f"line {number}" for number in range(9940, 10_000)]
    panel.close()


def test_a_request_is_shown_as_asked_received_and_done(tmp_path):
    run = live_run(tmp_path)
    panel = watch(run)
    panel.stop_button.click()
    (request,) = run.requests
    assert (request.kind, request.session, request.stage) == ("stop", 1, "asked")
    assert "Stop and save" in plain_text(panel.requests) and "ago" in plain_text(panel.requests)
    assert panel.stop_button.disabled and panel.save_button.disabled
    run.requests.receive(1)
    panel.refresh()
    assert "received, follows after this step or evaluation" in plain_text(panel.requests)
    (request,) = run.requests.pending(1)
    run.requests.acknowledge(request, "saved at step 31")
    run.set_status(state="stopped", step=31, exit_reason="stopped and saved by request")
    panel.refresh()
    assert plain_text(panel.requests).split("\n")[-4:-2] == [
        "saved at step 31",
        "",
    ] or "saved at step 31" in plain_text(panel.requests)
    assert "stopped and saved by request" in plain_text(panel.state)
    panel.close()


def test_a_trainer_that_ended_first_does_not_leave_a_question_open(tmp_path):
    run = live_run(tmp_path)
    panel = watch(run)
    panel.save_button.click()
    run.set_status(state="finished")
    panel.refresh()
    assert "not received: the trainer is finished" in plain_text(panel.requests)
    run.requests.acknowledge_all("the training had already ended")
    panel.refresh()
    assert "the training had already ended" in plain_text(panel.requests)
    panel.save_button.disabled = False  # a click that was on its way
    panel.save_button.click()
    assert "the run 'demo' is finished. Only a running trainer takes requests." in plain_text(panel.requests)
    panel.close()


def test_resume_calls_the_start_function(tmp_path):
    run = live_run(tmp_path)
    run.set_status(state="stopped")
    assert watch(run).resume_button.disabled
    calls = []
    panel = watch(run, start=lambda run: calls.append(run) or "demo trains in process 7")
    assert not panel.resume_button.disabled
    panel.resume_button.click()
    assert calls == [run]
    assert "demo trains in process 7" in plain_text(panel.requests)
    panel.close()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_dead_trainer_is_shown_as_dead_with_its_last_log_line(tmp_path, elsewhere):
    run = live_run(tmp_path)
    run.log_path.write_text("one\ntorch.OutOfMemoryError: CUDA out of memory\n")
    panel = watch(run, start=print)
    assert panel.view.status.state == "running"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    changes = {"host": "elsewhere", "heartbeat": time.time() - 61} if elsewhere else {"pid": gone.pid}
    write_json(run.status_path, dataclasses.replace(run.status(), **changes))
    panel.refresh()
    text = plain_text(panel.state)
    assert "dead" in text.split("\n")
    assert "may have been killed because memory ran out" in text
    assert "The last line of its log: torch.OutOfMemoryError: CUDA out of memory" in text
    assert panel.stop_button.disabled and not panel.resume_button.disabled
    panel.close()


def test_a_refusal_by_the_command_line_is_shown(tmp_path):
    run = live_run(tmp_path)
    run.log_path.write_text("error: train.seed: expected a whole number, got 'x'.\n")
    write_json(run.status_path, dataclasses.replace(run.status(), host="elsewhere", heartbeat=time.time() - 61))
    text = plain_text(watch(run).state)
    assert "train.seed: expected a whole number" in text and "memory" not in text


def test_an_interrupted_run_is_shown_as_interrupted(tmp_path):
    run = live_run(tmp_path)
    run.set_status(state="failed", exit_reason="interrupted", last_error="KeyboardInterrupt: ")
    text = plain_text(watch(run).state)
    assert "It was interrupted. Resume continues" in text and "KeyboardInterrupt" not in text


def test_a_run_on_another_machine_is_judged_by_its_heartbeat(tmp_path):
    run = live_run(tmp_path, host="elsewhere", pid=1, heartbeat=time.time() - 20)
    panel = watch(run)
    assert panel.view.status.state == "running"
    assert "20 s ago" in plain_text(panel.state)
    panel.close()


def test_the_used_part_of_the_budget_is_shown(tmp_path):
    run = live_run(tmp_path, spent_usd=0.32)
    run.save_config(
        run.config().with_settings({"train.stop_at_usd": 1, "train.stop_at_minutes": 3, "train.patience": 4})
    )
    run.append_progress({"session": 1, "step": 32, "eval_loss": 2.0, "evaluations_without_better": 2})
    panel = watch(run)
    assert [(limit.name, round(limit.share, 2)) for limit in panel.view.limits] == [
        ("dollars", 0.5),
        ("time", 0.5),
        ("patience", 0.5),
    ]
    text = plain_text(panel.limits)
    assert "0.50 of 1 USD" in text and "1 min 30 s of 3 min 00 s" in text
    assert "2 of 4 evaluations without a better loss" in text
    panel.close()


def test_a_failed_events_copy_is_shown(tmp_path):
    run = live_run(tmp_path)
    panel = watch(run)
    assert "TensorBoard" not in panel.readings.value
    state = {"target": "s3://b/p/demo", "last_error": "NoSuchBucket: <b>", "failing_since": 1.0, "pending_bytes": 2048}
    write_json(run.events_dir / "upload.json", state)
    panel.refresh()
    assert "s3://b/p/demo has not accepted the events" in plain_text(panel.readings)
    assert "NoSuchBucket: &lt;b&gt;" in panel.readings.value and "2.0 KiB wait" in panel.readings.value
    panel.close()


def test_values_of_an_earlier_session_are_not_shown(tmp_path):
    """Requests and the count for patience belong to the session in which they were made."""
    run = live_run(tmp_path)
    run.save_config(run.config().with_settings({"train.patience": 4}))
    run.append_progress({"session": 1, "step": 32, "eval_loss": 2.0, "evaluations_without_better": 3})
    run.request("save")
    run.set_status(state="stopped")
    run.open_session()
    panel = watch(run)
    assert panel.view.requests == () and panel.requests.value == ""
    assert "0 of 4 evaluations" in plain_text(panel.limits)
    assert panel.view.seconds_left is None, "a run that is starting has no pace yet"
    panel.close()


def test_only_a_live_run_has_a_last_sign_of_life(tmp_path):
    run = live_run(tmp_path, state="finished", heartbeat=time.time() - 3600)
    panel = watch(run)
    assert "sign of life" not in plain_text(panel.state)
    assert panel.view.seconds_left is None and "time left" not in plain_text(panel.state)
    panel.close()


def test_the_sums_of_the_session_and_of_the_run_are_told_apart(tmp_path):
    panel = watch(live_run(tmp_path, session=3, spent_s=300.0, spent_usd=0.5))
    text = plain_text(panel.state)
    assert "this session\n 1 min 30 s, 0.18 USD" in text
    assert "all 3 sessions\n 6 min 30 s, 0.68 USD" in text
    panel.close()


def test_what_is_left_names_the_limit_that_comes_first(tmp_path):
    run = live_run(tmp_path)
    run.save_config(run.config().with_settings({"train.stop_at_minutes": 3}))
    panel = watch(run)
    assert "about 1 min 30 s, until train.stop_at_minutes ends it" in plain_text(panel.state)
    panel.close()


@pytest.mark.parametrize("state", ["new", "running", "finished"])
def test_a_run_whose_folder_is_gone_says_so_and_offers_nothing(tmp_path, state):
    run = live_run(tmp_path, state=state)
    panel = watch(run, start=print)
    shutil.rmtree(run.folder)
    panel.refresh()
    assert "The folder of the run 'demo' is gone" in plain_text(panel.state)
    assert "no folder" in plain_text(panel.state)
    assert all(button.disabled for button in (panel.stop_button, panel.save_button, panel.resume_button))
    assert last_step(panel) == STEPS, "what was drawn stays"
    panel.close()


def test_a_zoom_stays_when_points_arrive_until_all_steps_are_asked_for(tmp_path):
    run = live_run(tmp_path)
    panel = watch(run)
    charts = panel.charts
    charts.first.value, charts.last.value = 10, 20
    assert charts.across == (10, 20) and steps(drawn(panel)[0][0]) == [10, 12, 14, 16, 18, 20]
    run.append_progress({"session": 1, "step": 32, "loss": 2.0})
    panel.refresh()
    assert (charts.first.value, charts.last.value) == (10, 20) and last_step(panel) == 20
    charts.all_steps.click()
    assert charts.across is None and last_step(panel) == 32
    charts.first.value = 50  # behind the last step that is drawn
    charts.last.value = 40
    assert charts.across[0] < charts.across[1]
    panel.close()


def test_smoothing_leaves_the_raw_line_and_a_logarithmic_axis_is_named(tmp_path):
    panel = watch(live_run(tmp_path))
    raw = drawn(panel)[0]
    assert re.findall('class="raw" d="([^"]+)"', panel.charts.box.value) == []
    panel.charts.smoothing.value, panel.charts.log.value = "strong", True
    assert len(re.findall('class="raw" d="([^"]+)"', panel.charts.box.value)) == 3  # loss, gradient norm, speed
    smooth = drawn(panel)[0]
    assert smooth[0] != raw[0] and smooth[1] == raw[1], "evaluations are not smoothed"
    assert "loss, nats per token, log scale" in plain_text(panel.charts.box)
    panel.close()


def test_a_run_that_has_not_begun(tmp_path):
    panel = watch(fake_run(tmp_path), start=print)
    assert "new" in plain_text(panel.state).split("\n")
    assert panel.resume_button.description == "Start" and not panel.resume_button.disabled
    assert panel.log.value == "" and 'aria-valuenow="0"' in panel.bar.value
    assert "Nothing to draw yet: training has not begun." in plain_text(panel.charts.box)
    panel.close()


def test_a_damaged_status_is_shown_until_it_is_repaired(tmp_path):
    run = live_run(tmp_path)
    good = run.status_path.read_text()
    panel = watch(run)
    run.status_path.write_text("{")
    panel.refresh()
    assert "is damaged" in plain_text(panel.state)
    run.status_path.write_text(good)
    panel.refresh()
    assert "running" in plain_text(panel.state)
    panel.close()


def test_without_widgets_it_is_a_table_and_a_picture(tmp_path):
    panel = watch(live_run(tmp_path, readings=GPUS))
    shown = panel._repr_mimebundle_()
    assert shown["text/plain"].startswith("demo: running (training), step 30 of 60")
    assert "evaluation loss" in shown["text/plain"]
    assert "<img alt=" in shown["text/html"] and "demo: running" in shown["text/html"]
    assert shown["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert repr(panel).splitlines()[1:] == shown["text/plain"].splitlines()[1:]
    panel.close()


def test_several_panels_follow_a_run_and_can_be_closed(tmp_path, monkeypatch):
    from qlora_helpers.views.widgets import watch_panel

    monkeypatch.setattr(watch_panel, "LIVE_S", 0.01)
    run = live_run(tmp_path)

    async def follow():
        one, other = watch(run), watch(run)
        for step in (32, 34):
            run.append_progress({"session": 1, "step": step, "loss": 2.0})
            for panel in (one, other):
                for _ in range(500):
                    if panel.closed or last_step(panel) == step:
                        break
                    await asyncio.sleep(0.01)
            assert last_step(other) == step
            if step == 32:
                assert last_step(one) == step
                one.close()
        assert last_step(one) == 32
        other.close()
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(follow())


def test_a_panel_opened_on_a_damaged_run_recovers(tmp_path, monkeypatch):
    from qlora_helpers.views.widgets import watch_panel

    monkeypatch.setattr(watch_panel, "LIVE_S", 0.01)
    monkeypatch.setattr(watch_panel, "QUIET_S", 0.01)
    run = live_run(tmp_path)
    whole = run.status_path.read_text()
    run.status_path.write_text("{")

    async def follow():
        panel = watch(run)
        await asyncio.sleep(0.1)
        assert "is damaged" in plain_text(panel.state)
        monkeypatch.setattr(panel._follower, "look", lambda: 1 / 0)
        await asyncio.sleep(0.1)
        assert "ZeroDivisionError" in plain_text(panel.state)
        monkeypatch.undo()
        run.status_path.write_text(whole)
        for _ in range(500):
            if panel.view.status.step == STEPS:
                break
            await asyncio.sleep(0.01)
        assert panel.view.status.step == STEPS
        panel.close()

    asyncio.run(follow())


@pytest.mark.parametrize("step", [2**70, -(10**400), 10**400])
def test_steps_out_of_range_are_skipped(tmp_path, step):
    run = live_run(tmp_path)
    run.append_progress({"session": 1, "step": step, "loss": 2.0, "gpus": [1, {"name": 3}]})
    run.append_progress({"session": 1, "step": 31, "loss": 2.0, "gpus": [1, {"name": 3}]})
    panel = watch(run)
    assert last_step(panel) == 31
    assert "31" in panel.still_text() and "<img" in panel.still_html()
    panel.close()


def test_a_look_costs_little_however_long_the_run(tmp_path, monkeypatch):
    """A panel of a run with 20,000 logged steps: one look without news, and one with a new step."""
    run = live_run(tmp_path)
    with open(run.progress_path, "a") as file:
        for step in range(STEPS + 1, 20_000):
            file.write(json.dumps({"session": 1, "step": step, "loss": 2.0, "grad_norm": 1.0, "time": step}) + "\n")
    panel = watch(run)
    assert len(drawn(panel)[0][0]) <= 400
    draws, original = [], live_charts.draw_run
    monkeypatch.setattr(live_charts, "draw_run", lambda *args, **named: draws.append(1) or original(*args, **named))
    for _ in range(20):
        panel.refresh()
    assert draws == []
    run.append_progress({"session": 1, "step": 20_000, "loss": 1.0})
    panel.refresh()
    assert draws == [1] and last_step(panel) == 20_000
    assert len(panel.charts.box.value) < 100_000, "however long the run, the page gets no more"
    panel.close()


def test_watching_imports_no_torch():
    code = "import sys; from qlora_helpers.views.widgets import watch; watch; from qlora_helpers.runs.launch import start; "
    code += "print(callable(watch), sorted({'torch', 'transformers', 'accelerate', 'boto3'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def test_a_finished_run_can_continue_after_its_settings_changed(tmp_path):
    run = live_run(tmp_path)
    run.set_status(state="finished")
    panel = watch(run, start=print)
    assert panel.resume_button.disabled
    changed = run.config().with_settings({"train.epochs": 2})
    run.save_config(changed)
    later = time.time() + 5
    os.utime(run.config_path, (later, later))
    panel.refresh()
    assert not panel.resume_button.disabled
    panel.close()


def test_a_cell_that_is_run_again_replaces_its_panel_and_closing_leaves_nothing(tmp_path, monkeypatch):
    from ipywidgets.widgets.widget import _instances as alive

    from qlora_helpers.views.widgets import watch_panel

    before = set(alive)
    run = live_run(tmp_path)
    monkeypatch.setattr(watch_panel, "_this_cell", lambda: "cell-1")
    first = watch(run)
    monkeypatch.setattr(watch_panel, "_this_cell", lambda: "cell-2")
    other = watch(run)
    monkeypatch.setattr(watch_panel, "_this_cell", lambda: "cell-1")
    second = watch(run)
    assert first.closed and not other.closed and not second.closed
    assert len(set(alive) - before) > 60
    second.close()
    other.close()
    assert not set(alive) - before


def test_waiting_for_a_step_and_for_the_end(tmp_path):
    run = live_run(tmp_path)
    panel = watch(run)

    async def wait():
        with pytest.raises(RunError, match="the run 'demo' is still running after 0.2 s"):
            await panel.wait(timeout_s=0.2)
        assert (await panel.wait(step=STEPS)).step == STEPS

        async def end():
            await asyncio.sleep(0.2)
            run.set_status(state="stopped")

        ending = asyncio.create_task(end())
        assert (await panel.wait(step=10_000)).state == "stopped"
        await ending

    asyncio.run(wait())
    assert panel.view.status.state == "stopped"
    panel.close()


def test_training_in_a_cell_is_shown_live_and_ends_as_a_picture(tmp_path):
    """A real kernel: the output that the notebook's file would hold after the cell."""
    import nbformat
    from nbclient import NotebookClient

    settings = ["data.train_rows=4", "data.eval_rows=1", "data.seq_len_tokens=128", "train.max_steps=3"]
    code = "from qlora_helpers import workflow\n"
    code += f"run = workflow.open_run('a', profile='tiny', settings={settings}, root={str(tmp_path)!r})"
    cells = [nbformat.v4.new_code_cell(code + "\nworkflow.train(run)")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for output in notebook.cells[0].outputs if output.output_type == "display_data"]
    place = next(place for place, output in enumerate(outputs) if "qlora-still" in output.data.get("text/html", ""))
    live, shown = outputs[place - 1], outputs[place]
    assert "application/vnd.jupyter.widget-view+json" in live.data and "text/html" not in live.data
    assert (
        "application/vnd.jupyter.widget-view+json" not in shown.data
        and 'class="qlora-still"' in shown.data["text/html"]
    )
    assert shown.data["text/plain"].startswith("a: finished, step 3 of 3")
    assert "<img alt=" in shown.data["text/html"]
    text = "".join(output.get("text", "") for output in notebook.cells[0].outputs if output.output_type == "stream")
    assert "'loss'" not in text
