"""What a teacher opens: by command and by button, over a folder, a bucket and the network, and that only the teacher can."""

from __future__ import annotations

import http.client
import io
import json
import re
import threading
from urllib.parse import urlencode

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import UserError
from qlora_helpers.commands import board as command
from qlora_helpers.teaching import collecting, exercises, receiving, releases
from qlora_helpers.teaching.board import groups_of, make_board
from qlora_helpers.teaching.releases import Release, next_shown, read_release, released, write_release

TOKEN, KEY = "class7", "0123456789abcdef"


@pytest.fixture
def common(tmp_path, monkeypatch):
    folder = tmp_path / "common"
    folder.mkdir()
    monkeypatch.setenv("QLORA_BOARD", str(folder))
    return folder


def test_the_teacher_opens_a_solution_and_shows_exercises(common, capsys):
    assert "Not yet" in repr(exercises.quantise.solution())
    assert "shown no exercise yet" in repr(exercises.today())
    assert main(["board", str(common), "--release", "quantise", "--show", "quantise,one_step"]) == 0
    assert capsys.readouterr().out == "Solutions open for everybody: quantise\nShown to the class: quantise, one_step\n"
    assert "Solution:" in repr(exercises.quantise.solution())
    assert "Not yet" in repr(exercises.one_step.solution())
    exercises.one_step.check(lambda weight, gradient, rate: weight - rate * gradient)
    table = exercises.today().table()
    assert [(row[1], row[2], row[4], row[5]) for row in table.rows] == [
        ("exercises.quantise", "01_load_model", "", "open"),
        ("exercises.one_step", "primer", "right", ""),
    ]


def test_all_none_and_next(common, capsys):
    lesson = ["--exercises", "one_step,write_a_loss,quantise"]
    assert main(["board", str(common), *lesson, "--release", "all", "--show", "next"]) == 0
    assert releases.teacher_release(common) == Release(
        ("one_step", "write_a_loss", "quantise"), ("one_step", "write_a_loss")
    )
    for _ in range(2):  # after the last there is nothing more to show
        assert main(["board", str(common), *lesson, "--show", "next"]) == 0
        assert releases.teacher_release(common).shown == ("one_step", "write_a_loss", "quantise")
    assert main(["board", str(common), "--release", "none", "--show", "none"]) == 0
    assert releases.teacher_release(common) == Release()
    assert "none" in capsys.readouterr().out


def test_next_follows_the_notebooks_of_the_lesson():
    groups = groups_of()
    assert groups[0] == ["write_a_loss", "one_step"] and sum(map(len, groups)) == len(exercises.all_exercises())
    assert next_shown(Release(), groups) == ("write_a_loss", "one_step")
    assert next_shown(Release(shown=("one_step", "write_a_loss")), groups) == tuple(groups[1])


def test_what_is_no_release_opens_nothing(common):
    for content in (b"", b"[]", b"{}", b'{"solutions": "all", "shown": []}', b"\xff", b"[" * 5000):
        (common / "release.json").write_bytes(content)
        assert released() == Release()
    assert read_release(json.dumps({"solutions": [1, "x" * 99], "shown": []}).encode()).solutions == ("1", "x" * 40)
    (common / "release.json").unlink()
    (common / "elsewhere").write_text('{"solutions": ["quantise"], "shown": []}')
    (common / "release.json").symlink_to(common / "elsewhere")
    assert released() == Release()


def test_without_a_board_nothing_is_asked(monkeypatch):
    monkeypatch.delenv("QLORA_BOARD", raising=False)
    assert released() == Release()


def test_what_was_read_last_counts_while_the_board_is_away_and_for_that_board_alone(common, tmp_path, monkeypatch):
    write_release(common, Release(("quantise",)))
    assert released().solutions == ("quantise",)
    common.rename(tmp_path / "away")
    assert released().solutions == ("quantise",)
    monkeypatch.setenv("QLORA_BOARD", str(tmp_path / "another"))
    assert released() == Release()


class Bucket:
    """As much of an S3 client as a board uses."""

    def __init__(self):
        self.kept = {}

    def put_object(self, *, Bucket, Key, Body):
        self.kept[Key] = Body

    def get_object(self, *, Bucket, Key):
        from botocore.exceptions import ClientError

        if Key not in self.kept:
            raise ClientError({"Error": {"Code": "NoSuchKey"}}, "GetObject")
        return {"Body": io.BytesIO(self.kept[Key])}

    def get_paginator(self, name):
        return self

    def paginate(self, *, Bucket, Prefix):
        return [{"Contents": [{"Key": key} for key in self.kept if key.startswith(Prefix)]}]


def test_a_bucket_holds_a_release_too(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(collecting, "s3_client", lambda: bucket)
    monkeypatch.setenv("QLORA_BOARD", "s3://class/monday")
    assert released() == Release()
    assert main(["board", "s3://class/monday", "--release", "quantise"]) == 0
    assert list(bucket.kept) == ["monday/release.json"]
    assert released().solutions == ("quantise",)

    def refuse(**named):
        raise PermissionError("no")

    monkeypatch.setattr(bucket, "get_object", refuse)
    assert released().solutions == ("quantise",), "what was read last"
    with pytest.raises(UserError, match="can't be read or written"):
        releases.teacher_release("s3://class/monday")


@pytest.fixture
def receiver(tmp_path, monkeypatch):
    folder = tmp_path / "class"
    page = receiving.TeacherPage(
        KEY,
        lambda action: command._board(str(folder), None).page(action=action),
        lambda fields: command._pressed(str(folder), None, fields),
    )
    found = receiving.Receiver(("127.0.0.1", 0), folder, TOKEN, page)
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("QLORA_BOARD", f"http://{TOKEN}@127.0.0.1:{found.server_port}")
    yield found
    found.shutdown()
    found.server_close()


def asked(receiver, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", receiver.server_port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content, answer.headers


def test_buttons_of_the_teacher_s_page_open_solutions_over_the_network(receiver):
    assert "Not yet" in repr(exercises.write_a_loss.solution())
    address = f"/teacher/{KEY}"
    _, page, headers = asked(receiver, "GET", address)
    assert headers["Content-Type"].startswith("text/html") and headers["Cache-Control"] == "no-store"
    assert "<script" not in page and "form-action 'self'" in page
    (action,) = set(re.findall(r'<form method="post" action="([^"]+)">', page))
    status, _, headers = asked(receiver, "POST", action, urlencode({"show": "next"}))
    assert (status, headers["Location"]) == (303, address)
    _, page, _ = asked(receiver, "GET", address)
    assert 'name="solution" value="write_a_loss"' in page and "Shown to the class: The loss of one token" in page
    assert asked(receiver, "POST", action, urlencode({"solution": "write_a_loss"}))[0] == 303
    assert "solution open for everybody" in asked(receiver, "GET", address)[1]
    assert "Solution:" in repr(exercises.write_a_loss.solution())
    assert [row[1] for row in exercises.today().table().rows] == ["exercises.write_a_loss", "exercises.one_step"]


def test_only_the_teacher_opens(receiver, monkeypatch):
    press = urlencode({"solution": "quantise"})
    with_token = {"Authorization": f"Bearer {TOKEN}"}
    assert asked(receiver, "POST", "/teacher/press", press, **with_token)[0] == 404
    assert asked(receiver, "POST", "/teacher/0000000000000000/press", press, **with_token)[0] == 404
    assert asked(receiver, "POST", "/release", press, **with_token)[0] == 404
    assert asked(receiver, "GET", "/release")[0] == 401, "who has no token sees nothing"
    assert asked(receiver, "GET", "/teacher/0000000000000000")[0] == 401
    assert asked(receiver, "POST", f"/teacher/{KEY}/press", "x" * 5000)[0] == 413
    assert asked(receiver, "POST", f"/teacher/{KEY}/press", "&".join("abcdefghij"))[0] == 400
    assert asked(receiver, "POST", f"/teacher/{KEY}/press", urlencode({"solution": "<b>", "show": "all"}))[0] == 303
    assert releases.teacher_release(receiver.folder) == Release()
    # Another computer of the room that knows the key gets nothing either
    monkeypatch.setattr(receiving.ipaddress, "ip_address", lambda text: type("Far", (), {"is_loopback": False}))
    assert asked(receiver, "GET", f"/teacher/{KEY}", **with_token)[0] == 404
    assert asked(receiver, "POST", f"/teacher/{KEY}/press", press, **with_token)[0] == 404
    assert releases.teacher_release(receiver.folder) == Release()


def test_a_page_that_is_a_file_has_no_buttons():
    page = make_board([], release=Release(("quantise",), ("quantise",))).page()
    assert "<form" not in page and "form-action 'none'" in page and "solution open for everybody" in page
