"""What a follower says of a run at one moment beside its curves; the tests of the panel look at it as a person does."""

from __future__ import annotations

import time

import pytest
from fake_run import STEPS, add_progress, fake_run

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.runs.status import Status
from qlora_helpers.views.follow import Follower, left_within
from qlora_helpers.views.readings import use_of


def status(**changes) -> Status:
    now = time.time()
    return Status(**{"state": "running", "started_at": now - 60, "heartbeat": now, "usd_per_hour": 36.0} | changes)


@pytest.mark.parametrize(
    ("limits", "left", "until"),
    [
        ({}, 600, ""),
        ({"stop_at_minutes": 3}, 120, "train.stop_at_minutes"),
        ({"stop_at_minutes": 60}, 600, ""),
        ({"stop_at_usd": 1.0}, 40, "train.stop_at_usd"),
        ({"stop_at_usd": 1.0, "stop_at_minutes": 1.5}, 30, "train.stop_at_minutes"),
        ({"stop_at_minutes": 0.5}, 0, "train.stop_at_minutes"),
    ],
)
def test_what_is_left_knows_the_limits(limits, left, until):
    found, name = left_within(600.0, TrainConfig(**limits), status())
    assert (round(found), name) == (left, until)


def test_dollars_of_earlier_sessions_count_and_an_unknown_price_limits_nothing():
    config = TrainConfig(stop_at_usd=1.0)
    assert left_within(600.0, config, status(spent_usd=0.3))[0] == pytest.approx(10.0)
    assert left_within(600.0, config, status(usd_per_hour=None)) == (600.0, "")
    assert left_within(None, config, status()) == (None, "")
    assert left_within(600.0, None, status()) == (600.0, "")


def test_of_several_gpus_the_fullest_and_the_least_busy_count():
    gpus = [{"memory_used_gib": 18.0, "load": 97}, {"memory_used_gib": 20.0, "load": 12}, {"load": "hot"}]
    assert use_of({"gpus": gpus}) == {"memory_gib": 20.0, "load_percent": 12.0}
    assert use_of({"process": {"rss_gib": 1.5, "cpu_percent": 90}}) == {"memory_gib": 1.5, "load_percent": 90.0}
    assert use_of({"gpus": 3}) == {} == use_of({})


def test_what_happened_at_which_step(tmp_path):
    run = fake_run(tmp_path)
    run.start_session(2 * STEPS, 0)
    add_progress(run)
    run.append_progress({"event": "saved", "session": 1, "step": 20})
    run.append_progress({"event": "saved", "session": 1, "step": 30})
    run.start_session(2 * STEPS, 20)
    run.append_progress({"session": 2, "step": 24, "eval_loss": 1.0})
    run.append_progress({"session": 2, "step": 28, "eval_loss": 1.5})
    view = Follower(run).look()
    assert view.events == (("saved", 20), ("resumed", 20), ("best", 24))
    assert view.curves["memory_gib"] and not view.on_gpu


def test_a_folder_that_is_gone_is_noticed_and_found_again(tmp_path):
    run = fake_run(tmp_path)
    follower = Follower(run)
    assert not follower.look().is_gone
    run.folder.rename(tmp_path / "aside")
    assert follower.look().is_gone
    (tmp_path / "aside").rename(run.folder)
    assert not follower.look().is_gone
