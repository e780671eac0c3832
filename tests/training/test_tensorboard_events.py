"""TensorBoard's files: readable by TensorBoard, and copied to a bucket that may come and go."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.runs.events_copy import CopyState, S3Copy, copy_state
from qlora_helpers.training.tensorboard_events import copy_events, event_callback, write_answers

ARGS, CONTROL = SimpleNamespace(), SimpleNamespace()


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step)


def config(place: str = "local") -> RunConfig:
    return RunConfig().with_settings({"train.tensorboard": place})


def write(run, steps, *, place="local", client=None, begin=0, end=True):
    """A session that logs a loss at each step."""
    callback = event_callback(run, config(place), s3_client=client)
    callback.on_train_begin(ARGS, state(begin), CONTROL)
    for step in steps:
        callback.on_log(ARGS, state(step), CONTROL, {"loss": 10.0 / step, "learning_rate": 1e-3, "epoch": 0.5})
    callback.on_log(ARGS, state(steps[-1]), CONTROL, {"eval_loss": 3.5})
    if end:
        callback.on_train_end(ARGS, state(steps[-1]), CONTROL)
    return callback


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def points(folder, tag) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in read(folder).Scalars(tag)]


@pytest.fixture(autouse=True)
def _bucket_is_named(monkeypatch):
    monkeypatch.setenv("QLORA_BUCKETS", "bucket")


class Bucket:
    """An S3 client that keeps what it is given, or fails as told."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], bytes] = {}
        self.failing: Exception | None = None
        self.calls = 0

    def put_object(self, *, Bucket: str, Key: str, Body: bytes) -> None:
        self.calls += 1
        if self.failing is not None:
            raise self.failing
        self.objects[Bucket, Key] = Body


def until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# files


def test_tensorboard_reads_them(run):
    write(run, [1, 2, 3])
    assert set(read(run.events_dir).Tags()["scalars"]) == {
        "train/loss",
        "train/learning_rate",
        "train/epoch",
        "eval/loss",
    }
    assert points(run.events_dir, "train/loss") == [(1, 10.0), (2, 5.0), (3, 10 / 3)]
    assert points(run.events_dir, "eval/loss") == [(3, 3.5)]
    assert "config/text_summary" in read(run.events_dir).Tags()["tensors"]
    text = read(run.events_dir).Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| model.name | HuggingFaceTB/SmolLM2-135M-Instruct |" in text


def test_a_resumed_session_supersedes_later_points(run):
    write(run, [1, 2, 3, 4])
    time.sleep(1.1)  # the files are named by the second
    write(run, [3, 4, 5], begin=2)
    steps = [step for step, _ in points(run.events_dir, "train/loss")]
    assert steps == [1, 2, 3, 4, 5]


def test_off_is_off(run):
    assert event_callback(run, config("off")) is None
    assert not run.events_dir.exists()


def test_what_was_written_before_a_crash_is_there(run):
    """Training that fails never says that it ended."""
    callback = write(run, [1, 2], end=False)
    callback.close()
    callback.close()
    assert points(run.events_dir, "train/loss") == [(1, 10.0), (2, 5.0)]


def test_a_full_disk_is_told_once_and_nobody_waits_for_it(run, monkeypatch, caplog):
    """More events than tensorboardX's queue holds, with a disk that takes none for a while: neither a log nor the end waits."""
    from tensorboardX.record_writer import RecordWriter

    caplog.set_level(logging.WARNING, "qlora_helpers.training.tensorboard_events")
    callback = event_callback(run, config())
    callback.on_train_begin(ARGS, state(0), CONTROL)
    whole, full = RecordWriter.flush, threading.Event()

    def flush(self):
        if full.is_set():
            raise OSError(28, "No space left on device")
        whole(self)

    monkeypatch.setattr(RecordWriter, "flush", flush)
    full.set()

    def session():
        for step in range(1, 41):
            callback.on_log(ARGS, state(step), CONTROL, {"loss": 10.0 / step})
            callback.writer.flush()
        full.clear()
        callback.close()

    training = threading.Thread(target=session, daemon=True)
    training.start()
    training.join(30)
    assert not training.is_alive()
    assert len([record for record in caplog.records if "No space left" in record.message]) == 1
    assert len(points(run.events_dir, "train/loss")) == 40  # what had to wait arrived


def test_nothing_to_close(run):
    """A run that was finished already begins no training."""
    event_callback(run, config()).close()
    assert not list(run.events_dir.glob("*"))


# the bucket


def test_files_are_copied_as_they_grow(run):
    bucket = Bucket()
    folder = run.events_dir
    folder.mkdir(parents=True)
    copy = S3Copy(folder, "s3://bucket/some/prefix/", client=bucket, every_s=0.01)
    path = folder / "events.out.1"
    path.write_bytes(b"one")
    until(lambda: bucket.objects == {("bucket", "some/prefix/events.out.1"): b"one"})
    calls = bucket.calls
    time.sleep(0.1)
    assert bucket.calls == calls  # what has not grown is not sent again
    path.write_bytes(b"one two")
    (folder / "note.txt").touch()
    copy.close()
    assert bucket.objects == {("bucket", "some/prefix/events.out.1"): b"one two"}
    assert copy.problem is None
    assert not copy._thread.is_alive()


def client_error():
    from botocore.exceptions import ClientError

    return ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "PutObject")


def no_connection():
    from botocore.exceptions import EndpointConnectionError

    return EndpointConnectionError(endpoint_url="http://127.0.0.1:9")


def full_pool():
    return RuntimeError("whatever else a library may raise")


@pytest.mark.parametrize("failure", [client_error, no_connection, full_pool, lambda: ConnectionRefusedError("refused")])
def test_a_bucket_that_is_away_is_told_once_and_caught_up_with(run, failure, caplog):
    bucket = Bucket()
    bucket.failing = failure()
    folder = run.events_dir
    folder.mkdir(parents=True)
    (folder / "events.out.1").write_bytes(b"one")
    with caplog.at_level(logging.WARNING, "qlora_helpers.training.tensorboard_events"):
        copy = S3Copy(folder, "s3://bucket/prefix", client=bucket, every_s=0.01)
        until(lambda: bucket.calls >= 3)
        assert copy.problem.startswith(type(bucket.failing).__name__)
        until(lambda: copy_state(folder) is not None)
        told = copy_state(folder)
        assert (told.target, told.pending_bytes, told.last_success) == ("s3://bucket/prefix", 3, None)
        assert told.last_error == copy.problem and told.failing_since <= time.time()
        (folder / "events.out.1").write_bytes(b"one two")
        bucket.failing = None
        until(lambda: copy.problem is None)
        copy.close()
    told = copy_state(folder)
    assert (told.pending_bytes, told.last_error, told.failing_since) == (0, None, None)
    assert abs(told.last_success - time.time()) < 60
    assert bucket.objects == {("bucket", "prefix/events.out.1"): b"one two"}
    assert [record.message.split(":")[0] for record in caplog.records] == ["events could not be copied to s3"]
    assert "training goes on" in caplog.text


def test_a_real_client_without_a_server_never_raises(run, monkeypatch):
    """boto3's own, on an address where nobody listens."""
    import boto3
    from botocore.config import Config

    quick = Config(connect_timeout=1, retries={"max_attempts": 1})
    client = boto3.client(
        "s3",
        endpoint_url="http://127.0.0.1:9",
        region_name="us-east-1",
        aws_access_key_id="x",
        aws_secret_access_key="x",
        config=quick,
    )
    write(run, [1, 2], place="s3://bucket/prefix", client=client, end=False)
    callback = write(run, [1, 2], place="s3://bucket/prefix", client=client)
    assert callback.copy.problem is not None
    assert [step for step, _ in points(run.events_dir, "train/loss")][:2] == [1, 2]


def test_the_run_s_files_reach_the_bucket_below_its_name(run):
    bucket = Bucket()
    callback = write(run, [1, 2], place="s3://bucket/a/prefix/", client=bucket)
    ((name, key),) = bucket.objects
    (path,) = run.events_dir.glob("events.*")
    assert (name, key) == ("bucket", f"a/prefix/mine/{path.name}")
    assert bucket.objects[name, key] == path.read_bytes()  # the last points too
    assert not callback.copy._thread.is_alive()


def test_training_that_fails_leaves_no_thread_behind(run):
    callback = write(run, [1], place="s3://bucket/prefix", client=Bucket(), end=False)
    assert callback.copy._thread in threading.enumerate()
    callback.close()
    assert callback.copy._thread not in threading.enumerate()


def test_a_bucket_that_was_away_to_the_end_is_caught_up_with_later(run):
    run.save_config(config("s3://bucket/prefix"))
    bucket = Bucket()
    bucket.failing = client_error()
    write(run, [1, 2], place="s3://bucket/prefix", client=bucket)
    with pytest.raises(
        RunError, match="s3://bucket/prefix/mine did not take the events.*AccessDenied.*whole in the run"
    ):
        copy_events(run, s3_client=bucket)
    bucket.failing = None
    state = copy_events(run, s3_client=bucket)
    assert (state.last_error, state.pending_bytes) == (None, 0)
    (path,) = run.events_dir.glob("events.*")
    assert bucket.objects == {("bucket", f"prefix/mine/{path.name}"): path.read_bytes()}


def test_events_that_stay_here_have_nothing_to_catch_up_with(run):
    run.save_config(config())
    with pytest.raises(RunError, match="are not copied to a bucket"):
        copy_events(run)


DAMAGES = [
    "",
    "[]",
    "{",
    '{"pending_bytes": 3}',
    '{"target": "s3://b/p", "last_success": "noon"}',
    '{"target": "s3://b/p", "last_error": "x", "pending_bytes": "many"}',
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_no_state(run, damage):
    run.events_dir.mkdir(parents=True)
    assert copy_state(run.events_dir) is None
    (run.events_dir / "upload.json").write_text(damage)
    assert copy_state(run.events_dir) is None


def test_what_a_panel_says():
    assert CopyState("s3://b/p").line() == "s3://b/p: nothing has been copied yet"
    assert CopyState("s3://b/p", 100.0).line(now=172.0) == "s3://b/p: all events were copied 1 min 12 s ago"
    failing = CopyState("s3://b/p", 100.0, "ClientError: no", 110.0, pending_bytes=2560)
    assert failing.line(now=140.0) == (
        "s3://b/p has not accepted the events for 30 s (ClientError: no); "
        "2.5 KiB wait in the run folder, training goes on and nothing is lost"
    )


def test_a_process_does_not_hang_on_a_bucket_that_never_answers(tmp_path):
    """A connection that is taken and never answered: the slowest way for a bucket to be away."""
    code = (
        "import pathlib, sys; from qlora_helpers.runs.events_copy import S3Copy; folder = pathlib.Path(sys.argv[1]);"
        "(folder / 'events.1').write_bytes(b'x'); S3Copy(folder, 's3://bucket/prefix').close(timeout_s=4)"
    )
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        account = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
        }
        environment = os.environ | account | {"PYTHONPATH": str(Path(__file__).parents[2])}
        started = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, timeout=60
        )
        silent.setblocking(False)
        silent.accept()  # it was asked
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert time.monotonic() - started < 30  # botocore alone waits a minute for an answer, and asks again


# hyperparameters and texts


def test_settings_are_hyperparameters(run):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    write(run, [1])
    events = read(run.events_dir)
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert data.plugin_name == "hparams"
    values = HParamsPluginData.FromString(data.content).session_start_info.hparams
    assert values["adapter.r"].number_value == config().adapter.r
    assert values["data.packing"].bool_value is config().data.packing
    assert values["model.name"].string_value == config().model.name


def text(folder, tag) -> list[tuple[int, str]]:
    return [
        (event.step, event.tensor_proto.string_val[0].decode()) for event in read(folder).Tensors(f"{tag}/text_summary")
    ]


def test_samples_and_later_their_answers(run):
    shown = {"test-001": {"dialogue": "Ana: <b>hi</b>\nBo: *hi*", "its summary": "They say hi."}}
    callback = event_callback(run, config(), samples=shown)
    callback.on_train_begin(ARGS, state(0), CONTROL)
    callback.on_log(ARGS, state(3), CONTROL, {"loss": 1.0})
    callback.on_train_end(ARGS, state(3), CONTROL)
    run.set_status(step=3)
    answered = {"test-001": shown["test-001"] | {"answer of tuned": "", "answer of base": "a\x1b[31mb\u202e"}}
    bucket = Bucket()
    write_answers(run, config("s3://bucket/prefix"), answered, {"rouge_l_tuned": 12.5}, s3_client=bucket)
    (before, first), (after, second) = text(run.events_dir, "samples/test-001")
    assert (before, after) == (0, 3)
    assert first == "**dialogue**\n\n    Ana: <b>hi</b>\n    Bo: *hi*\n\n**its summary**\n\n    They say hi."
    assert second == f"{first}\n\n**answer of tuned**\n\n    (empty)\n\n**answer of base**\n\n    ab"
    assert points(run.events_dir, "scores/rouge_l_tuned") == [(3, 12.5)]
    assert len(bucket.objects) == 2


def test_answers_are_not_written_where_tensorboard_is_off(run):
    write_answers(run, config("off"), {"a": {"dialogue": "x"}}, {})
    assert not run.events_dir.exists()
