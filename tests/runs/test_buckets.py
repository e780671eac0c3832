"""Events go to a bucket that a person has named on this machine, which must belong to their account; files alone go there."""

from __future__ import annotations

import json
import os

import boto3
import pytest
from botocore.stub import Stubber
from fake_run import finished_run

from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.runs import buckets, events_copy
from qlora_helpers.runs.events_copy import S3Copy, copy_of
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.launch import start
from qlora_helpers.runs.opening import new_run, open_run
from qlora_helpers.runs.session import training_session

THEIRS = "s3://strangers-bucket/in"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", buckets.OWNER, buckets.CONFIRMED):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def theirs(tmp_path):
    """A run folder from somebody else, whose settings name their bucket."""
    run = finished_run(tmp_path / "runs")
    values = json.loads(run.config_path.read_text())
    values["train"]["tensorboard"] = THEIRS
    run.config_path.write_text(json.dumps(values))
    return run


def named(config) -> bool:
    try:
        buckets.refuse_unconfirmed(config)
    except RunError:
        return False
    return True


def test_a_bucket_that_a_stranger_s_settings_name_is_refused(theirs, capsys):
    for act in (
        lambda: training_session(theirs).__enter__(),
        lambda: start(theirs),
        lambda: copy_of(theirs, theirs.config(), client=object()),
    ):
        with pytest.raises(RunError, match="nobody has named on this machine yet: strangers-bucket"):
            act()
    assert main(["train", str(theirs.folder)]) == 2
    assert main(["evaluate", str(theirs.folder)]) == 2
    assert f"--set train.tensorboard={THEIRS}" in capsys.readouterr().err


def test_changing_something_else_does_not_confirm_it(theirs):
    open_run(theirs.folder, settings={"train.max_steps": 40})
    theirs.change_config(theirs.config().with_settings({"train.save_steps": 7}))
    theirs.save_config(theirs.config())
    assert not named(theirs.config())


@pytest.mark.parametrize("as_dict", [True, False])
def test_setting_it_again_confirms_it(theirs, as_dict):
    open_run(theirs.folder, settings={"train.tensorboard": THEIRS} if as_dict else [f"train.tensorboard={THEIRS}"])
    assert named(theirs.config())


def test_a_bucket_that_is_set_here_is_confirmed(tmp_path):
    run = new_run("mine", profile="tiny", settings=["train.tensorboard=s3://mine/prefix"], root=tmp_path / "runs")
    assert named(run.config())
    run.change_config(run.config().with_settings({"train.tensorboard": "s3://other/prefix"}))  # as a form does
    assert named(run.config())
    assert json.loads((tmp_path / "cache" / "buckets.json").read_text()) == ["mine", "other"]


def test_a_job_is_told_which_bucket_counts(theirs, monkeypatch):
    monkeypatch.setenv("QLORA_BUCKETS", "another strangers-bucket")
    assert named(theirs.config())


def test_a_damaged_record_confirms_nothing(theirs, tmp_path):
    (tmp_path / "cache").mkdir(exist_ok=True)
    for content in ("{", '{"strangers-bucket": 1}', "[1]", '"strangers-bucket"'):
        (tmp_path / "cache" / "buckets.json").write_text(content)
        assert not named(theirs.config())


def test_events_that_stay_here_need_no_bucket(tmp_path):
    assert named(finished_run(tmp_path / "runs").config())


class Bucket:
    def __init__(self) -> None:
        self.puts: list[dict] = []

    def put_object(self, **request) -> None:
        self.puts.append(request)


def test_a_link_among_the_events_is_not_uploaded(tmp_path):
    run, secret = Run(tmp_path / "mine"), tmp_path / "credentials"
    secret.write_text("aws_secret_access_key")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "events.secret").write_text("aws_secret_access_key")
    run.events_dir.mkdir(parents=True)
    (run.events_dir / "events.1").write_text("curve")
    (run.events_dir / "events.2").symlink_to(secret)
    (run.events_dir / "folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(run.events_dir / "events.3")
    bucket = Bucket()
    copy = S3Copy(run.events_dir, "s3://bucket/prefix", client=bucket, owner="123456789012")
    copy.close()
    assert copy.problem is None
    assert bucket.puts == [
        {"Bucket": "bucket", "Key": "prefix/events.1", "Body": b"curve", "ExpectedBucketOwner": "123456789012"}
    ]


def test_a_file_that_becomes_a_link_is_not_read(tmp_path, monkeypatch):
    events = tmp_path / "events"
    events.mkdir()
    (tmp_path / "secret").write_text("token")
    (events / "events.1").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(S3Copy, "_files", lambda self: [(events / "events.1", 5)])
    copy = S3Copy(events, "s3://bucket/prefix", client=(bucket := Bucket()))
    copy.close()
    assert bucket.puts == [] and "OSError" in copy.problem


def test_the_bucket_must_be_of_the_account_of_the_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setattr(buckets, "caller", lambda: {"Account": "123456789012"})
    client = boto3.client("s3", region_name="us-east-1")
    monkeypatch.setattr(events_copy, "new_s3_client", lambda: client)
    (tmp_path / "events.1").write_text("curve")
    asked = {"Bucket": "bucket", "Key": "prefix/events.1", "Body": b"curve", "ExpectedBucketOwner": "123456789012"}
    with Stubber(client) as stub:
        stub.add_response("put_object", {}, asked)
        copy = S3Copy(tmp_path, "s3://bucket/prefix")
        copy.close()
        stub.assert_no_pending_responses()
    assert copy.problem is None


def test_another_account_may_be_named_and_another_s3_has_none(monkeypatch):
    monkeypatch.setenv(buckets.OWNER, "210987654321")
    assert buckets.expected_owner() == {"ExpectedBucketOwner": "210987654321"}
    monkeypatch.delenv(buckets.OWNER)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000")
    assert buckets.expected_owner() == {}


def test_an_account_that_can_not_be_found_out_is_one_message(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with pytest.raises(UserError, match="does not say which account.*Set QLORA_BUCKET_OWNER"):
        buckets.expected_owner()
