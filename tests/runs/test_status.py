"""A run's status is true: of a trainer that lives, one that was killed, and one on another machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.runs.folder import Status


def ended_process() -> int:
    """The id of a process that has ended and was waited for: nobody has it."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_session_of_training_in_its_status(run):
    assert run.status() == Status()
    assert repr(run) == "Run('mine', new)"
    assert run.start_session(max_steps=10, resumed_from=0) == 1
    status = run.status()
    assert (status.state, status.step, status.max_steps, status.session) == ("running", 0, 10, 1)
    assert (status.pid, status.host) == (os.getpid(), socket.gethostname())
    assert abs(status.heartbeat - time.time()) < 10
    run.set_status(step=4)
    assert run.status().step == 4
    run.set_status(state="stopped", exit_reason="stopped and saved by request")
    assert run.start_session(max_steps=10, resumed_from=4) == 2
    status = run.status()
    assert (status.state, status.step, status.session, status.exit_reason) == ("running", 4, 2, None)


def test_an_unknown_state_is_refused(run):
    with pytest.raises(ValueError, match="got 'sleeping'"):
        run.set_status(state="sleeping")
    assert not run.status_path.exists()


def test_fields_of_a_later_version_are_ignored(run):
    write_json(run.status_path, {"state": "finished", "step": 3, "mood": "good"})
    assert run.status() == Status(state="finished", step=3)


def test_a_process_that_no_longer_exists_is_dead(run):
    run.start_session(max_steps=10, resumed_from=0)
    run.set_status(pid=ended_process(), step=3)
    status = run.status()
    assert (status.state, status.step) == ("dead", 3)
    assert status.exit_reason == "the trainer's process ended without reporting why"
    with pytest.raises(RunError, match="the run 'mine' is dead"):
        run.request("stop")
    assert run.start_session(max_steps=10, resumed_from=2) == 2
    assert run.status().state == "running"


def test_a_killed_process_that_nobody_waited_for_is_dead(run):
    """A kernel that started the trainer and does not ask after it keeps its entry in the process table."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    try:
        run.start_session(max_steps=10, resumed_from=0)
        run.set_status(pid=process.pid)
        assert run.status().state == "running"
        process.kill()
        for _ in range(100):
            if run.status().state == "dead":
                break
            time.sleep(0.05)
        assert run.status().state == "dead"
    finally:
        process.kill()
        process.communicate()


def test_a_later_process_with_the_same_id_is_not_the_trainer(run):
    """After a restart of the machine the old number belongs to somebody else."""
    run.start_session(max_steps=10, resumed_from=0)
    values = read_json(run.status_path)
    write_json(run.status_path, values | {"heartbeat": values["heartbeat"] - 365 * 86400})
    assert run.status().state == "dead"


def test_a_trainer_on_another_machine_is_judged_by_its_heartbeat(run):
    run.start_session(max_steps=10, resumed_from=0)
    run.set_status(host="another-machine", pid=ended_process())
    assert run.status().state == "running"
    write_json(run.status_path, read_json(run.status_path) | {"heartbeat": time.time() - 120})
    assert run.status().state == "dead"
    run.set_status(step=1)  # a late sign of life
    assert run.status().state == "running"


@pytest.mark.parametrize("content", ["[]", "null", "7", '"running"', "{"])
def test_a_damaged_status_is_reported(run, content):
    run.folder.mkdir(parents=True)
    run.status_path.write_text(content)
    with pytest.raises(RunError, match=r"status\.json is damaged"):
        run.status()


def test_time_and_price_of_all_sessions():
    never = Status(heartbeat=1_000.0)
    assert (never.session_s, never.used_s, never.used_usd) == (0.0, 0.0, None)
    first = Status(session=1, started_at=1_000.0, heartbeat=4_600.0, usd_per_hour=2.0)
    assert (first.session_s, first.used_s, first.used_usd) == (3_600.0, 3_600.0, 2.0)
    second = Status(session=2, started_at=9_000.0, heartbeat=10_800.0, spent_s=3_600.0, spent_usd=2.0)
    assert (second.used_s, second.used_usd) == (5_400.0, 2.0)  # this session's price is not known
    assert Status(started_at=5_000.0, heartbeat=4_000.0).session_s == 0.0  # a clock that was set back


def test_the_next_session_starts_without_what_the_last_one_left():
    last = Status(
        state="failed",
        step=4,
        max_steps=10,
        pid=7,
        host="other",
        session=1,
        heartbeat=4_600.0,
        exit_reason="an error",
        last_error="oops",
        started_at=1_000.0,
        spent_s=5.0,
        spent_usd=1.0,
        usd_per_hour=2.0,
        readings={"gpus": []},
    )
    new = last.next_session()
    assert (new.state, new.session, new.step, new.max_steps) == ("starting", 2, 4, 10)
    assert (new.exit_reason, new.last_error, new.usd_per_hour, new.readings) == (None, None, None, None)
    assert (new.spent_s, new.spent_usd, new.host) == (3_605.0, 3.0, socket.gethostname())
    assert abs(new.started_at - time.time()) < 10


def test_a_session_that_was_opened_for_a_trainer_is_taken_over(run):
    assert run.open_session(usd_per_hour=2.0).session == 1
    taken_over = run.open_session()
    assert (taken_over.session, taken_over.usd_per_hour) == (1, 2.0)
    assert run.open_session(usd_per_hour=3.0).usd_per_hour == 3.0
    assert run.start_session(max_steps=4, resumed_from=0) == 1
    run.set_status(state="finished")
    assert (run.open_session().session, run.status().usd_per_hour) == (2, None)
