"""The trainer writes to a real S3 API that goes away and comes back; TensorBoard reads it through its own HTTP API."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.parse
import urllib.request

import pytest

from qlora_helpers import workflow
from qlora_helpers.base.files import read_json
from qlora_helpers.runs import events_copy
from qlora_helpers.runs.events_copy import copy_state
from qlora_helpers.training import tensorboard_events
from qlora_helpers.views.tensorboard import start_tensorboard

SMALL = {
    "data.train_rows": 8,
    "data.eval_rows": 1,
    "data.test_rows": 2,
    "data.seq_len_tokens": 256,
    "train.max_steps": 6,
    "train.logging_steps": 1,
    "train.eval_steps": 3,
    "train.tensorboard": "s3://bucket/some/prefix",
}


class S3:
    """moto's server on one port; its buckets outlive a stop."""

    def __init__(self) -> None:
        self.port, self._server = 0, None
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@pytest.fixture
def s3(monkeypatch):
    """The server, with the usual AWS variables pointing there, and copies every twentieth of a second."""
    server = S3()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(events_copy, "COPY_EVERY_S", 0.05)
    yield server
    server.stop()


def until(found, seconds: float = 30.0):
    """What a look finds once it finds something."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def at_steps(monkeypatch, actions) -> None:
    """Has the trainer's event callback do something after it has logged a step's loss."""
    make = tensorboard_events.event_callback

    def with_actions(*args, **kwargs):
        callback = make(*args, **kwargs)
        log = callback.on_log

        def on_log(args, state, control, logs=None, **kwargs):
            log(args, state, control, logs=logs, **kwargs)
            if "loss" in logs and state.global_step in actions:
                actions.pop(state.global_step)()

        callback.on_log = on_log
        return callback

    monkeypatch.setattr(tensorboard_events, "event_callback", with_actions)


class Api:
    """TensorBoard's HTTP API."""

    def __init__(self, page) -> None:
        self.url = f"{page.url}data/"

    def get(self, path: str, body: dict | None = None, **query: str):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}?{urllib.parse.urlencode(query)}", data)
        request.add_header("Content-Type", "application/json")
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


def test_a_bucket_that_becomes_unreachable_during_training(s3, tmp_path, monkeypatch):
    run = workflow.open_run("mine", profile="tiny", settings=SMALL, root=tmp_path)
    events_copy.new_s3_client().create_bucket(Bucket="bucket")

    def away() -> None:
        until(lambda: (state := copy_state(run.events_dir)) and state.last_success)
        s3.stop()
        until(lambda: copy_state(run.events_dir).last_error)

    def back() -> None:
        assert copy_state(run.events_dir).last_error is not None
        assert copy_state(run.events_dir).pending_bytes > 0
        s3.start()

    at_steps(monkeypatch, {2: away, 4: back})
    workflow.train(run, show_progress=False)
    workflow.evaluate(run)
    state = copy_state(run.events_dir)
    assert (state.target, state.last_error, state.pending_bytes) == ("s3://bucket/some/prefix/mine", None, 0)

    with start_tensorboard(run, from_s3=True) as page:
        api = Api(page)
        last = "scores/rouge_l_tuned"  # written last: once it is read, all is
        scalars = until(
            lambda: (tags := api.get("plugin/scalars/tags")) and last in tags.get("mine", {}) and tags["mine"]
        )
        assert {"train/loss", "eval/loss", "train/learning_rate", "train/grad_norm"} <= scalars.keys()
        for tag, name in {"train/loss": "loss", "eval/loss": "eval_loss"}.items():
            read = [(step, value) for _, step, value in api.get("plugin/scalars/scalars", tag=tag, run="mine")]
            logged = [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in run.progress() if name in line]
            assert read == logged and len(read) == {"loss": 6, "eval_loss": 2}[name]
        rouge = api.get("plugin/scalars/scalars", tag=last, run="mine")
        assert [step for _, step, _ in rouge] == [6]

        row = read_json(run.evaluation_path)["rows"][0]
        texts = api.get("plugin/text/text", tag=f"samples/{row['id']}/text_summary", run="mine")
        assert [text["step"] for text in texts] == [0, 6]
        assert "answer of tuned" in texts[1]["text"] and "answer of tuned" not in texts[0]["text"]

        asked = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
            "colParams": [],
            "startIndex": 0,
            "sliceSize": 10,
        }
        (group,) = api.get("plugin/hparams/session_groups", body=asked)["sessionGroups"]
        assert group["hparams"]["adapter.r"] == run.config().adapter.r
        assert group["hparams"]["train.learning_rate"] == run.config().train.learning_rate


def test_a_bucket_that_is_created_later(s3, tmp_path):
    run = workflow.open_run("mine", profile="tiny", settings=SMALL, root=tmp_path)
    run.events_dir.mkdir(parents=True)
    (run.events_dir / "events.out.1").write_bytes(b"points")
    copy = events_copy.S3Copy(run.events_dir, "s3://later/some/prefix/mine")
    told = until(lambda: copy_state(run.events_dir))
    assert "NoSuchBucket" in told.last_error and told.pending_bytes == 6
    client = events_copy.new_s3_client()
    client.create_bucket(Bucket="later")
    until(lambda: copy_state(run.events_dir).last_error is None)
    copy.close()
    assert client.get_object(Bucket="later", Key="some/prefix/mine/events.out.1")["Body"].read() == b"points"
