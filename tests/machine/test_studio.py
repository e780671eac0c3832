"""SageMaker Studio: activity is reported to it, and an app may be shut down when the work is done."""

from __future__ import annotations

import datetime
import json
import os

import pytest

from qlora_helpers import workflow
from qlora_helpers.base.errors import UserError
from qlora_helpers.machine import studio
from qlora_helpers.runs import heartbeat, session
from qlora_helpers.sagemaker import after_training, resources

APP = {"DomainId": "d-1", "SpaceName": "lab", "AppType": "JupyterLab", "AppName": "default"}


@pytest.fixture
def in_studio(tmp_path, monkeypatch):
    """An app of Studio; yields the file that it reads."""
    metadata = tmp_path / "resource-metadata.json"
    metadata.write_text(json.dumps({"ResourceName": "default"} | {key: APP[key] for key in list(APP)[:3]}))
    monkeypatch.setattr(studio, "STUDIO_METADATA", metadata)
    monkeypatch.setattr(studio, "IDLE_FILE", tmp_path / "last-active")
    return tmp_path / "last-active"


def as_studio_reads_it(path) -> datetime.datetime:
    return datetime.datetime.strptime(path.read_text().strip(), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=datetime.UTC)


def test_activity_is_reported_in_the_format_that_studio_reads(in_studio):
    assert studio.report_activity()
    age = datetime.datetime.now(datetime.UTC) - as_studio_reads_it(in_studio)
    assert 0 <= age.total_seconds() < 5


def test_nothing_is_written_outside_studio(tmp_path, monkeypatch):
    monkeypatch.setattr(studio, "STUDIO_METADATA", tmp_path / "nothing")
    monkeypatch.setattr(studio, "IDLE_FILE", tmp_path / "last-active")
    assert not studio.report_activity()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("QLORA_STUDIO_IDLE_FILE", str(tmp_path / "mine"))
    assert studio.report_activity()
    assert as_studio_reads_it(tmp_path / "mine")


def test_a_link_in_the_files_place_is_not_followed(in_studio, tmp_path):
    (tmp_path / "precious").write_text("keep")
    os.symlink(tmp_path / "precious", in_studio)
    assert not studio.report_activity()
    assert (tmp_path / "precious").read_text() == "keep"


def test_activity_is_reported_only_while_a_run_trains(in_studio, run, monkeypatch):
    import time

    monkeypatch.setattr(heartbeat, "REQUESTS_EVERY_S", 0.01)
    monkeypatch.setattr(heartbeat, "STUDIO_EVERY_S", 0.02)
    run.start_session(max_steps=4, resumed_from=0)
    with heartbeat.sending_heartbeats(run, 1):
        for _ in range(500):
            if in_studio.exists():
                break
            time.sleep(0.01)
        assert in_studio.exists()
    told = in_studio.read_text()
    time.sleep(0.1)
    assert in_studio.read_text() == told


# shutting down


class Client:
    def __init__(self):
        self.deleted = []

    def delete_app(self, **app):
        self.deleted.append(app)


@pytest.fixture
def client(monkeypatch):
    client = Client()
    monkeypatch.setattr(resources, "new_client", lambda name: client)
    return client


def test_this_app_is_shut_down(in_studio, client):
    assert resources.stop_this_app() == APP
    assert client.deleted == [APP]
    studio.STUDIO_METADATA.unlink()
    with pytest.raises(UserError, match="this is not an app of SageMaker Studio"):
        resources.stop_this_app()


@pytest.mark.parametrize(
    ("wanted", "state", "reason", "error", "shut"),
    [
        (True, "finished", "all steps are done", None, True),
        (True, "stopped", "stopped and saved by its budget: 2.00 USD of train.stop_at_usd=2 are used", None, True),
        (True, "failed", None, ZeroDivisionError("oops"), True),
        (True, "stopped", "stopped and saved by request", None, False),
        (True, "failed", None, KeyboardInterrupt(), False),
        (False, "finished", "all steps are done", None, False),
    ],
)
def test_the_app_is_shut_down_after_a_run_unless_a_person_ended_it(
    in_studio, client, tmp_path, wanted, state, reason, error, shut
):
    import contextlib

    run = workflow.open_run("mine", profile="tiny", root=tmp_path / "runs")
    with (
        contextlib.suppress(ZeroDivisionError, KeyboardInterrupt),
        session.training_session(run, at_end=after_training.shut_app_down if wanted else None),
    ):
        if error:
            raise error
        run.set_status(state=state, exit_reason=reason)
    assert client.deleted == ([APP] if shut else [])


def test_a_run_that_could_not_begin_shuts_nothing_down(in_studio, client, tmp_path):
    from qlora_helpers.base.errors import RunError
    from qlora_helpers.runs import locks

    run = workflow.open_run("mine", profile="tiny", root=tmp_path / "runs")
    with (
        locks.run_lock(run),
        pytest.raises(RunError),
        session.training_session(run, at_end=after_training.shut_app_down),
    ):
        pass
    assert client.deleted == []


def test_the_command_line_passes_the_option_on(monkeypatch, tmp_path):
    from qlora_helpers.__main__ import main

    calls = []
    monkeypatch.setattr(
        workflow,
        "train",
        lambda run, *, shut_down_app, in_this_process, say: calls.append({"shut_down_app": shut_down_app}),
    )
    main(["train", str(tmp_path / "runs" / "mine"), "--profile", "tiny", "--shut-down-app"])
    main(["train", str(tmp_path / "runs" / "mine")])
    assert calls == [{"shut_down_app": True}, {"shut_down_app": False}]
