"""TensorBoard's files: readable by TensorBoard, and copied to a bucket that may come and go."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace

import pytest

from qlora_helpers.config import RunConfig
from qlora_helpers.events import S3Copy, event_callback, tensorboard_arguments

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


class Bucket:
    """An S3 client that keeps what it is given, or fails as told."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], bytes] = {}
        self.failing: Exception | None = None
        self.calls = 0

    def upload_file(self, path: str, bucket: str, key: str) -> None:
        self.calls += 1
        if self.failing is not None:
            raise self.failing
        with open(path, "rb") as file:
            self.objects[bucket, key] = file.read()


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
    assert read(run.events_dir).Tags()["tensors"] == ["config/text_summary"]
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


def upload_failed():
    from boto3.exceptions import S3UploadFailedError

    return S3UploadFailedError("Failed to upload")


@pytest.mark.parametrize(
    "failure", [client_error, no_connection, upload_failed, lambda: ConnectionRefusedError("refused")]
)
def test_a_bucket_that_is_away_is_told_once_and_caught_up_with(run, failure, caplog):
    bucket = Bucket()
    bucket.failing = failure()
    folder = run.events_dir
    folder.mkdir(parents=True)
    (folder / "events.out.1").write_bytes(b"one")
    with caplog.at_level(logging.WARNING, "qlora_helpers.events"):
        copy = S3Copy(folder, "s3://bucket/prefix", client=bucket, every_s=0.01)
        until(lambda: bucket.calls >= 3)
        assert copy.problem.startswith(type(bucket.failing).__name__)
        (folder / "events.out.1").write_bytes(b"one two")
        bucket.failing = None
        until(lambda: copy.problem is None)
        copy.close()
    assert bucket.objects == {("bucket", "prefix/events.out.1"): b"one two"}
    assert [record.message.split(":")[0] for record in caplog.records] == ["events could not be copied to s3"]
    assert "training goes on" in caplog.text


def test_a_real_client_without_a_server_never_raises(run, monkeypatch):
    """boto3's own, on an address where nobody listens."""
    import boto3
    from botocore.config import Config

    quick = Config(connect_timeout=1, retries={"max_attempts": 1})
    client = boto3.client("s3", endpoint_url="http://127.0.0.1:9", region_name="us-east-1", aws_access_key_id="x",
                          aws_secret_access_key="x", config=quick)  # fmt: skip
    write(run, [1, 2], place="s3://bucket/prefix", client=client, end=False)
    callback = write(run, [1, 2], place="s3://bucket/prefix", client=client)
    assert callback.copy.problem is not None
    assert [step for step, _ in points(run.events_dir, "train/loss")][:2] == [1, 2]


def test_the_run_s_files_reach_the_bucket_below_its_name(run):
    bucket = Bucket()
    callback = write(run, [1, 2], place="s3://bucket/a/prefix/", client=bucket)
    ((name, key),) = bucket.objects
    (path,) = run.events_dir.iterdir()
    assert (name, key) == ("bucket", f"a/prefix/mine/{path.name}")
    assert bucket.objects[name, key] == path.read_bytes()  # the last points too
    assert not callback.copy._thread.is_alive()


def test_training_that_fails_leaves_no_thread_behind(run):
    callback = write(run, [1], place="s3://bucket/prefix", client=Bucket(), end=False)
    assert callback.copy._thread in threading.enumerate()
    callback.close()
    assert callback.copy._thread not in threading.enumerate()


# showing them


def test_arguments_for_tensorboard(run):
    assert tensorboard_arguments(run, config()) == ["--logdir", str(run.events_dir)]
    assert tensorboard_arguments(run, config("s3://bucket/p/"), port=lambda: 6007) == [
        "--logdir", "s3://bucket/p/mine", "--port", "6007",
    ]  # fmt: skip
