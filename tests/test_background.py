"""A run in a process of its own: started, watched, asked, stopped, killed, and kept off what another one has."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from qlora_helpers import launch
from qlora_helpers.errors import RunError
from qlora_helpers.run import Run
from qlora_helpers.training_checkpoints import newest_good

SETTINGS = [
    "data.train_rows=4", "data.eval_rows=1", "data.test_rows=1", "data.seq_len_tokens=128", "train.micro_batch_size=1",
    "train.max_steps=2000", "train.eval_steps=1000", "train.save_steps=1000", "train.tensorboard=off",
]  # fmt: skip


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
        if status.is_live and status.pid:
            for process in [*psutil.Process(status.pid).children(recursive=True), psutil.Process(status.pid)]:
                process.kill()
            until(lambda status=status: not psutil.pid_exists(status.pid) or ended(status.pid))


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_run_of_its_own_is_started_asked_stopped_and_resumed(make):
    run = make()
    before = time.monotonic()
    started = launch.start(run)
    assert time.monotonic() - before < 2
    assert repr(started) == f"mine trains in process {started.pid}; its log: mine/log.txt"
    status = run.status()
    assert (status.state, status.pid, status.session) == ("starting", started.pid, 1)
    assert os.getsid(started.pid) == started.pid != os.getsid(0)  # a restarted kernel ends its own group
    with pytest.raises(RunError, match=rf"'mine' is being trained already, in process {started.pid} on "):
        launch.start(run)
    early = run.request("save")  # while the model loads
    until(lambda: any("loss" in line for line in run.progress()), run)
    assert run.status().state == "running"
    until(lambda: answer(run, early), run)
    assert answer(run, early).startswith("saved at step ")
    with pytest.raises(RunError, match="is being trained already"):
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
    return next(each.answer for each in run.requests() if each.id == request.id)


def test_a_killed_run_is_told_as_dead_with_what_it_said_last(make):
    from qlora_helpers import monitor

    run = make()
    started = launch.start(run)
    until(lambda: any("loss" in line for line in run.progress()), run)
    os.kill(started.pid, signal.SIGKILL)
    until(lambda: run.status().state == "dead")
    assert "without a word" in run.status().exit_reason
    assert "why it ended: the trainer's process ended without a word" in repr(monitor.watch_once(run))
    with pytest.raises(RunError, match="the run 'mine' is dead"):
        run.request("stop")
