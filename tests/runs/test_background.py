"""A run in a process of its own: started, watched, asked, stopped, killed, and kept off resources that another run uses."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from qlora_helpers.base.errors import RunError
from qlora_helpers.runs import launch
from qlora_helpers.runs.folder import Run
from qlora_helpers.training.checkpoints import newest_good

SETTINGS = [
    "data.train_rows=4",
    "data.eval_rows=1",
    "data.test_rows=1",
    "data.seq_len_tokens=128",
    "train.micro_batch_size=1",
    "train.max_steps=2000",
    "train.eval_steps=1000",
    "train.save_steps=1000",
    "train.tensorboard=off",
]


def until(true, process_of: Run | None = None, seconds: float = 90):
    """Waits until something holds and returns it; a trainer that ended meanwhile fails the test with its log."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        ended = process_of is not None and process_of.status().state in ("failed", "dead")
        if ended or time.monotonic() > deadline:
            log = process_of.log_path.read_text() if process_of and process_of.log_path.exists() else ""
            raise AssertionError(f"waited in vain{' for ' + repr(process_of) if process_of else ''}:\n{log[-3000:]}")
        time.sleep(0.05)
    return found


@pytest.fixture
def make(tmp_path, cache):
    """Makes runs, and ends what trains in them after the test."""
    from qlora_helpers.workflow import open_run

    runs = []

    def make(name="mine", *more, **kwargs):
        runs.append(open_run(name, profile="tiny", settings=[*SETTINGS, *more], root=tmp_path / "runs"))
        return runs[-1]

    yield make
    for run in runs:
        status = run.status()
        if status.is_live and status.pid not in (None, os.getpid()):
            for process in [*psutil.Process(status.pid).children(recursive=True), psutil.Process(status.pid)]:
                process.kill()
            until(lambda status=status: not psutil.pid_exists(status.pid) or ended(status.pid))


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_background_run_is_started_asked_stopped_and_resumed(make):
    run = make()
    before = time.monotonic()
    started = launch.start(run)
    assert time.monotonic() - before < 2
    assert repr(started) == f"mine trains in process {started.pid}; its log: mine/log.txt"
    status = run.status()
    assert (status.state, status.pid, status.session) == ("starting", started.pid, 1)
    assert os.getsid(started.pid) == started.pid != os.getsid(0)  # a restarted kernel ends its own group
    with pytest.raises(RunError, match=rf"'mine' is already being trained, in process {started.pid} on "):
        launch.start(run)
    early = run.request("save")  # while the model loads
    until(lambda: any("loss" in line for line in run.progress()), run)
    assert run.status().state == "running"
    until(lambda: answer(run, early), run)
    assert answer(run, early).startswith("saved at step ")
    received = next(each.received_at for each in run.requests if each.id == early.id)
    assert received < run.progress()[0]["time"]  # before there was a step to save after
    with pytest.raises(RunError, match="is already being trained"):
        launch.start(run)
    stop = run.request("stop")
    until(lambda: run.status().state == "stopped", run)
    status = run.status()
    assert status.exit_reason == "stopped and saved by request"
    assert answer(run, stop) == f"saved at step {status.step}"
    assert newest_good(run.checkpoints_dir).name == f"checkpoint-{status.step}"
    until(lambda: ended(started.pid))
    assert "/2000" not in run.log_path.read_text()  # no bar of steps in the log
    assert run.log_path.read_text().count(", loss ") <= len(run.progress())  # each once

    resumed = launch.start(run, settings=[f"train.max_steps={status.step + 2}"])
    assert run.status().session == 2
    until(lambda: run.status().state == "finished", run)
    assert run.status().step == status.step + 2
    steps = [line["step"] for line in run.progress() if "loss" in line]
    assert steps == [*range(1, status.step + 3)]
    until(lambda: ended(resumed.pid))


def answer(run, request):
    return next(each.answer for each in run.requests if each.id == request.id)


def test_a_killed_run_is_dead_and_its_last_output_is_shown(make):
    from qlora_helpers.views import monitor

    run = make()
    started = launch.start(run)
    until(lambda: any("loss" in line for line in run.progress()), run)
    os.kill(started.pid, signal.SIGKILL)
    until(lambda: run.status().state == "dead")
    assert "without reporting why" in run.status().exit_reason
    assert "why it ended: the trainer's process ended without reporting why" in repr(monitor.watch_once(run))
    with pytest.raises(RunError, match="the run 'mine' is dead"):
        run.request("stop")


def test_a_stop_reaches_every_process_of_several(make):
    """The panel of a run in two processes: it is asked, all stop at the same step, and the checkpoint is whole."""
    from qlora_helpers.views.widgets import watch

    run = make("two", "data.train_rows=8")
    panel = watch(run, start=lambda run: launch.start(run, processes=2))
    panel.resume_button.click()
    assert panel.view.status.state == "starting"
    pid = run.status().pid
    until(lambda: any("loss" in line for line in run.progress()), run)
    workers = psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []
    assert run.status().pid != pid  # the first worker's now
    panel.refresh()
    panel.stop_button.click()
    until(lambda: run.status().state == "stopped", run)
    panel.refresh()
    step = run.status().step
    assert f"saved at step {step}" in panel.requests.value
    assert newest_good(run.checkpoints_dir).name == f"checkpoint-{step}"
    until(lambda: ended(pid) and all(ended(worker.pid) for worker in workers))
    assert "Traceback" not in run.log_path.read_text()
    panel.close()


@pytest.mark.only_slow
def test_a_budget_stops_every_process_of_several(make):
    """As a request does in the test above: the first process decides, and sends what it decided to the others."""
    run = make("two", "data.train_rows=8", "train.stop_at_usd=0.5", "train.usd_per_hour=100")
    started = launch.start(run, processes=2)
    until(lambda: run.status().state == "stopped", run)
    status = run.status()
    assert "USD of train.stop_at_usd=0.5 are used" in status.exit_reason
    assert newest_good(run.checkpoints_dir).name == f"checkpoint-{status.step}"
    assert run.progress()[-1]["usd"] <= status.used_usd
    until(lambda: ended(started.pid))
    with pytest.raises(RunError, match="USD, and train.stop_at_usd is 0.5. Raise train.stop_at_usd to go on"):
        launch.start(run)


def test_a_run_that_cannot_begin_says_why_in_status_and_log(make):
    run = make("mine", "data.source=./nothing.jsonl")
    started = launch.start(run)
    until(lambda: run.status().state == "failed")
    assert "nothing.jsonl" in run.status().last_error
    until(lambda: ended(started.pid))
    assert "error: " in run.log_path.read_text()


def test_fixed_settings_are_refused_before_a_process_starts(make):
    run = make()
    (run.checkpoints_dir / "checkpoint-3").mkdir(parents=True)
    before = run.status()
    with pytest.raises(RunError, match=r"has trained already, and these can't change now: adapter.r: 8 -> 16"):
        launch.start(run, settings=["adapter.r=16"])
    assert run.status() == before and not run.log_path.exists()


def test_a_run_that_was_never_made_is_not_started(tmp_path):
    with pytest.raises(RunError, match="the run 'new' does not exist yet"):
        launch.start(Run(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_heartbeats_cost_less_than_one_percent_of_a_core(make, monkeypatch):
    """CPU seconds of the heartbeat's thread in a second of training, at the pace that it keeps."""
    from qlora_helpers.runs import heartbeat

    run = make()
    run.start_session(max_steps=4, resumed_from=0)
    for kind in ("save", "stop"):
        run.requests.acknowledge(run.request(kind), "done")
    heartbeat.readings()
    started = time.thread_time()
    for _ in range(20):
        run.requests.receive(1)
    listening = (time.thread_time() - started) / 20
    started = time.thread_time()
    for _ in range(20):
        run.set_status(readings=heartbeat.readings())
    beat = (time.thread_time() - started) / 20
    share = listening / heartbeat.REQUESTS_EVERY_S + beat / heartbeat.HEARTBEAT_EVERY_S
    print(f"{100 * share:.3f} % of a core")
    assert share < 0.01


def test_a_restarted_kernel_does_not_touch_the_run(make):
    """A real kernel starts the run, is interrupted, restarted and shut down."""
    from jupyter_client.manager import start_new_kernel

    run = make()
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        code = "from qlora_helpers.runs import launch\nfrom qlora_helpers.runs.folder import Run\n"
        reply = client.execute_interactive(code + f"print(launch.start(Run({str(run.folder)!r})).pid)", timeout=60)
        assert reply["content"]["status"] == "ok"
        pid = run.status().pid
        manager.interrupt_kernel()
        manager.restart_kernel(now=False)
        until(lambda: run.status().state == "running" and run.progress(), run)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=False)
    steps = len(run.progress())
    until(lambda: len(run.progress()) > steps, run)
    assert run.status().pid == pid
    assert "Interrupt" not in run.log_path.read_text()
