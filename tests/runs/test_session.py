"""A training session holds its locks, and whatever happens its status and its requests say how it ended."""

from __future__ import annotations

import contextlib
import errno
import os
import time

import pytest

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.runs import heartbeat, locks, session
from qlora_helpers.runs.session import training_session


@pytest.fixture
def made(run):
    run.save_config(profile_config("tiny"))
    return run


def test_a_session_is_open_during_the_block(made):
    ended = []
    with training_session(made, at_end=ended.append):
        assert locks.is_locked(made)
        assert (made.status().state, made.status().session, made.status().pid) == ("starting", 1, os.getpid())
        made.set_status(state="finished")
        assert ended == []
    assert ended == [made]
    assert not locks.is_locked(made)
    assert made.status().state == "finished"
    assert made.log_path.exists()


def test_the_end_is_announced_while_the_lock_is_held(made):
    held = []
    with training_session(made, at_end=lambda run: held.append(locks.is_locked(run))):
        pass
    assert held == [True]


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (ZeroDivisionError("oops"), "an error", "ZeroDivisionError: oops"),
        (SystemExit(1), "an error", "SystemExit: 1"),
        (ValueError("x" * 5000), "an error", ("ValueError: " + "x" * 5000)[: session.LONGEST_ERROR]),
    ],
)
def test_an_error_is_recorded_and_raised_again(made, error, reason, message):
    ended = []

    def fail() -> None:
        with training_session(made, at_end=ended.append):
            made.request("stop")
            raise error

    with pytest.raises(type(error)):
        fail()
    status = made.status()
    assert (status.state, status.exit_reason, status.last_error) == ("failed", reason, message)
    assert [request.answer for request in made.requests] == ["the training failed first"]
    assert ended == [made]
    assert "training ended: " in made.log_path.read_text()
    assert not locks.is_locked(made)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupt_is_no_failure(made, error):
    """A person's, or SIGTERM's before there was anything to save."""

    def stop() -> None:
        with training_session(made):
            made.request("stop")
            raise error

    with pytest.raises(type(error)):
        stop()
    status = made.status()
    assert (status.state, status.exit_reason, status.last_error) == ("stopped", "interrupted", None)
    assert [request.answer for request in made.requests] == ["the training was interrupted first"]
    assert "ERROR" not in made.log_path.read_text()


def test_requests_that_came_too_late_are_answered(made):
    with training_session(made):
        made.request("save")
    assert [request.answer for request in made.requests] == ["the training had already ended"]


def test_a_full_disk_does_not_hide_the_error(made, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail() -> None:
        with training_session(made):
            monkeypatch.setattr(os, "fsync", full)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_a_session_that_could_not_begin_ends_nothing(made):
    ended = []
    made.set_status(state="finished", spent_usd=3.0)
    made.save_config(made.config().with_settings(["train.stop_at_usd=2", "train.usd_per_hour=1"]))
    with pytest.raises(RunError, match="has used 3.00 USD"), training_session(made, at_end=ended.append):
        pass
    assert ended == []
    assert (made.status().state, made.status().session) == ("failed", 0)


def test_a_budget_without_a_price_is_refused(made, monkeypatch):
    made.save_config(made.config().with_settings(["train.stop_at_usd=2"]))
    monkeypatch.delenv("QLORA_INSTANCE", raising=False)
    with pytest.raises(UserError, match="price"), training_session(made):
        pass
    assert made.status().state == "failed"


def test_the_price_and_the_heartbeat_are_the_sessions(made, monkeypatch):
    monkeypatch.setattr(heartbeat, "REQUESTS_EVERY_S", 0.01)
    made.save_config(made.config().with_settings(["train.usd_per_hour=1.5"]))
    with training_session(made):
        assert made.status().usd_per_hour == 1.5
        made.request("save")
        for _ in range(500):
            if [request.stage for request in made.requests] == ["received"]:
                break
            time.sleep(0.01)
        assert [request.stage for request in made.requests] == ["received"]


def test_machines_that_train_together_cost_as_many_times_as_much(made, monkeypatch):
    made.save_config(made.config().with_settings(["train.usd_per_hour=1.5"]))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    with training_session(made):
        assert made.status().usd_per_hour == 4.5


@pytest.mark.parametrize(("device_map", "expected"), [("auto", ("GPU-a",)), ("cpu", ())])
def test_gpus_are_locked_unless_the_run_is_on_the_cpu(made, monkeypatch, device_map, expected):
    made.save_config(made.config().with_settings([f"model.device_map={device_map}"]))
    locked = []
    monkeypatch.setattr(locks, "visible_gpus", lambda: ("GPU-a",))

    @contextlib.contextmanager
    def gpu_locks(run, gpus):
        locked.append(tuple(gpus))
        yield

    monkeypatch.setattr(locks, "gpu_locks", gpu_locks)
    with training_session(made):
        pass
    assert locked == [expected]
