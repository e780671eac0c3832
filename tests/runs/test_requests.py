"""A person's requests reach the right session once, and each is answered."""

from __future__ import annotations

import pytest

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import write_json
from qlora_helpers.runs.requests import Request, Requests


def test_a_request_reaches_the_trainer_once(run):
    with pytest.raises(RunError, match=r"the run 'mine' is new\. Only a running trainer takes requests\."):
        run.request("stop")
    session = run.start_session(max_steps=10, resumed_from=0)
    assert run.requests.pending(session) == []
    first, second = run.request("save"), run.request("stop")
    assert [request.kind for request in run.requests.pending(session)] == ["save", "stop"]
    run.requests.acknowledge(first, "saved at step 3")
    assert run.requests.pending(session) == [second]
    received = list(run.requests)[0]
    assert (received.id, received.answer) == (first.id, "saved at step 3")
    assert received.acknowledged_at >= received.asked_at
    with pytest.raises(RunError, match="unknown request; expected stop or save; got 'pause'"):
        run.request("pause")


def test_a_stale_request_cannot_hit_a_later_session(run):
    session = run.start_session(max_steps=10, resumed_from=0)
    request = run.request("stop")
    run.set_status(state="finished")
    later = run.start_session(max_steps=10, resumed_from=0)
    assert run.requests.pending(later) == []
    (stale,) = run.requests
    assert stale.id == request.id
    assert stale.session == session
    assert stale.answer.startswith("stale")


def test_files_without_a_valid_request_are_skipped(run):
    session = run.start_session(max_steps=10, resumed_from=0)
    asked = run.request("save")
    for name, content in {"1-a": "{", "2-b": "[]", "3-c": '{"kind": "stop"}', "4-d": "null", "x": "{}"}.items():
        (run.requests_dir / f"{name}.json").write_text(content)
    assert run.requests.pending(session) == [asked]


def test_a_request_is_asked_received_and_answered(tmp_path):
    requests = Requests(tmp_path / "requests")
    assert list(requests) == []
    request = requests.add("save", session=3)
    assert (request.stage, request.session, request.kind) == ("asked", 3, "save")
    requests.receive(2)  # another session's trainer
    assert [each.stage for each in requests] == ["asked"]
    requests.receive(3)
    (received,) = requests
    assert received.stage == "received" and received.received_at >= request.asked_at
    requests.receive(3)  # once is enough
    assert list(requests) == [received]
    assert requests.pending(3) == [received]
    requests.acknowledge(received, "saved")
    (answered,) = requests
    assert (answered.stage, answered.answer, answered.received_at) == ("answered", "saved", received.received_at)
    assert answered.acknowledged_at >= received.received_at
    assert requests.pending(3) == []


def test_an_answer_also_marks_a_request_as_received(tmp_path):
    requests = Requests(tmp_path / "requests")
    requests.acknowledge(requests.add("stop", session=1), "done")
    (answered,) = requests
    assert answered.received_at == answered.acknowledged_at


def test_open_requests_are_all_answered_and_answers_stay(tmp_path):
    requests = Requests(tmp_path / "requests")
    requests.acknowledge(requests.add("save", session=1), "saved")
    requests.add("stop", session=1)
    requests.acknowledge_all("it ended")
    assert [(each.kind, each.answer) for each in requests] == [("save", "saved"), ("stop", "it ended")]


def test_requests_to_a_later_session_stay_open(tmp_path):
    requests = Requests(tmp_path / "requests")
    requests.add("stop", session=2)
    assert requests.pending(1) == []
    assert [each.stage for each in requests] == ["asked"]


def test_a_request_of_an_earlier_version_was_heard(tmp_path):
    requests = Requests(tmp_path)
    values = {"id": "1-stop", "kind": "stop", "session": 1, "asked_at": 5.0, "heard_at": 6.0}
    write_json(tmp_path / "1-stop.json", values | {"acknowledged_at": None, "answer": None})
    assert list(requests) == [Request("1-stop", "stop", 1, 5.0, received_at=6.0)]


@pytest.mark.parametrize("changes", [{"kind": "pause"}, {"session": "1"}, {"asked_at": None}, {"answer": 3}])
def test_a_request_with_a_wrong_value_is_skipped(tmp_path, changes):
    write_json(tmp_path / "1-stop.json", {"id": "1-stop", "kind": "stop", "session": 1, "asked_at": 5.0} | changes)
    assert list(Requests(tmp_path)) == []
