"""The board: what many learners' lines mean together, how they arrive, and that nothing in them is trusted."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import UserError
from qlora_helpers.teaching import collecting, exercises, receiving, sending
from qlora_helpers.teaching.attempts import Attempt, record
from qlora_helpers.teaching.board import make_board

NOW = 1_000_000.0
TOKEN = "class7"


def line(seat, exercise, outcome, *, before=0.0, misconception=""):
    """A line that was written so many minutes ago."""
    return Attempt(seat, exercise, outcome, misconception, 1, 0.0, NOW - 60 * before)


def seats(*lines, **options):
    board = make_board(lines, now=NOW, **options)
    return {seat.name: seat for seat in board.seats}


def test_a_seat_has_three_colours_and_right_stays_right():
    found = seats(
        line("7", "quantise", "not tried", before=3),
        line("7", "one_step", "wrong", before=2),
        line("7", "write_a_loss", "right", before=2),
        line("7", "write_a_loss", "wrong", before=1),
    )["7"]
    assert found.states == {"quantise": "open", "one_step": "wrong", "write_a_loss": "right"}


def test_a_hint_is_a_look_and_does_not_hide_an_answer():
    assert seats(line("7", "quantise", "hint"))["7"].states == {"quantise": "open"}
    lines = line("7", "quantise", "wrong", before=1), line("7", "quantise", "hint")
    assert seats(*lines)["7"].states == {"quantise": "wrong"}


def test_stuck_is_half_as_long_again_as_planned_without_a_line():
    planned = exercises.quantise.minutes
    assert not seats(line("7", "quantise", "wrong", before=1.5 * planned - 1))["7"].stuck
    assert "nothing for" in seats(line("7", "quantise", "wrong", before=1.5 * planned + 1))["7"].stuck
    assert not seats(line("7", "quantise", "wrong", before=500))["7"].stuck, "nobody sits there any more"


def test_who_has_an_answer_right_sits_at_the_next_one_and_who_has_all_is_never_stuck():
    lesson = ["one_step", "write_labels"]
    planned = exercises.write_labels.minutes
    one = line("7", "one_step", "right", before=1.5 * planned + 1)
    assert seats(one, exercises=lesson)["7"].stuck
    assert not seats(line("7", "one_step", "right", before=1.5 * planned - 1), exercises=lesson)["7"].stuck
    assert not seats(one, exercises=["one_step"])["7"].stuck


def test_stuck_is_three_equal_wrong_answers():
    def wrong(*codes):
        lines = [line("7", "one_step", "wrong", before=9 - n, misconception=code) for n, code in enumerate(codes)]
        return seats(*lines, line("8", "one_step", "wrong"))["7"].stuck

    assert "same wrong answer" in wrong("uphill", "uphill", "uphill")
    assert "same" not in wrong("uphill", "uphill", "no-rate")
    assert "same" not in wrong("", "", ""), "answers that nothing recognises need not be equal"


def test_the_commonest_wrong_answer_counts_seats_and_not_tries():
    lines = [line("1", "one_step", "wrong", misconception="uphill") for _ in range(5)]
    lines += [line(seat, "one_step", "wrong", misconception="no-rate") for seat in "234"]
    found = make_board(lines, now=NOW).misconceptions
    assert [(code, count) for _, code, count in found] == [("no rate", 3), ("uphill", 1)]


def test_the_board_is_a_table_and_a_page_without_scripts():
    board = make_board([line("7", "one_step", "right"), line("12", "one_step", "wrong", before=20)], now=NOW)
    text = repr(board)
    assert "2 seats, 1 may be stuck" in text and "✓" in text and "One step downhill" in text
    assert [seat.name for seat in board.seats] == ["12", "7"], "who may be stuck comes first"
    page = board.page()
    assert '<meta http-equiv="refresh" content="10">' in page and "<script" not in page
    assert 'class="right"' in page and 'class="wrong"' in page


def test_what_learners_send_is_text():
    evil = "<b>\x1b[31m\u202e\nx</b>" + "y" * 50
    board = make_board([line(evil, "one_step", "wrong", misconception="<i>"), line("7", "<u>", "right")], now=NOW)
    assert "\x1b" not in repr(board) and "\u202e" not in repr(board) and "<u>" not in repr(board)
    assert "<b>" not in board.page() and "<i>" not in board.page()
    many = [line(str(number), "one_step", "right") for number in range(2000)]
    assert len(make_board(many, now=NOW).seats) == 300


def test_lines_that_cannot_be_are_left_out():
    good = json.dumps(line("7", "one_step", "right").__dict__)
    bad = ['{"seat": 1}', good.replace("one_step", "nothing"), good.replace('"right"', '"won"'), "[" * 5000]
    bad += [
        good.replace("1000000.0", "NaN"),
        good.replace("1000000.0", "1e999"),
        good.replace('"tries": 1', '"tries": 1e30'),
    ]
    content = "\n".join([*bad, good]).encode()
    assert collecting.clean(collecting.read_lines(content)) == [line("7", "one_step", "right")]


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A receiver of this machine, and a learner whose lines go there."""
    receiver = receiving.Receiver(("127.0.0.1", 0), tmp_path / "class", TOKEN)
    threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("QLORA_BOARD", f"http://{TOKEN}@127.0.0.1:{receiver.server_port}")
    monkeypatch.setenv("QLORA_SEAT", "7")
    yield receiver
    receiver.shutdown()
    receiver.server_close()


def test_lines_arrive_over_http_and_again_without_doubling(board, capsys):
    record("one_step", "wrong", "uphill")
    sending.send()
    record("one_step", "right")
    assert main(["board", "--send"]) == 0
    out = capsys.readouterr().out
    assert TOKEN not in out and "Sent" in out
    found = collecting.collect(board.folder).attempts
    assert [(each.seat, each.outcome, each.misconception) for each in found] == [
        ("7", "wrong", "uphill"),
        ("7", "right", ""),
    ]


def test_a_check_sends_by_itself_and_waits_for_nobody(board):
    exercises.one_step.check(lambda weight, gradient, rate: weight - rate * gradient)
    end = time.monotonic() + 20
    while not collecting.collect(board.folder).attempts and time.monotonic() < end:
        time.sleep(0.02)
    assert [each.outcome for each in collecting.collect(board.folder).attempts] == ["right"]


def test_lines_wait_while_the_teacher_is_away(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("QLORA_BOARD", f"http://{TOKEN}@127.0.0.1:{port}")
    monkeypatch.setattr(sending, "RETRY_S", 0.05)
    monkeypatch.setattr(sending, "MOST_RETRIES", 2000)
    exercises.one_step.check(lambda weight, gradient, rate: 0)  # returns at once though nobody is there
    with pytest.raises(sending.NotDelivered, match="does not answer"):
        sending.send()
    receiver = receiving.Receiver(("127.0.0.1", port), tmp_path / "class", TOKEN)
    threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    end = time.monotonic() + 20
    while not collecting.collect(receiver.folder).attempts and time.monotonic() < end:
        time.sleep(0.02)
    assert [each.outcome for each in collecting.collect(receiver.folder).attempts] == ["wrong"]
    receiver.shutdown()
    receiver.server_close()


def asked(board, *, method="POST", path="/attempts", body=b"{}\n", **headers):
    given = {"Authorization": f"Bearer {TOKEN}", "X-Qlora-Seat": "9", "X-Qlora-Seat-Key": "a" * 32}
    connection = http.client.HTTPConnection("127.0.0.1", board.server_port, timeout=10)
    connection.request(method, path, body, given | {key.replace("_", "-"): value for key, value in headers.items()})
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_receiver_refuses_what_is_not_a_learner_s(board):
    assert asked(board) == 204
    assert asked(board, Authorization="Bearer other") == asked(board, Authorization=TOKEN) == 401
    assert asked(board, path="/attempts/../x") == 404
    assert asked(board, method="GET") == 404
    assert asked(board, method="PUT") == 501
    assert asked(board, Content_Length="-1") == asked(board, Content_Length="x") == 411
    assert asked(board, Content_Length=str(10**8)) == 413
    assert asked(board, X_Qlora_Seat_Key="short") == 400
    assert asked(board, X_Qlora_Seat_Key="b" * 32) == 409, "another learner's seat"
    names = {path.name for path in board.folder.iterdir()}
    assert names == {sending.file_name("9"), sending.file_name("9").replace("jsonl", "owner")}


def test_a_seat_is_the_sender_s_and_no_path(board):
    body = json.dumps(line("somebody else", "one_step", "right").__dict__).encode()
    assert asked(board, body=body, X_Qlora_Seat="../../etc/x") == 204
    assert {each.seat for each in collecting.collect(board.folder).attempts} == {"../../etc/x"}
    assert all(path.parent == board.folder for path in board.folder.rglob("*"))


def test_seats_are_limited(board, monkeypatch):
    monkeypatch.setattr(receiving, "MOST_SEATS", 2)
    assert [asked(board, X_Qlora_Seat=name) for name in "1231"] == [204, 204, 507, 204]


def test_a_connection_that_sends_nothing_ends(board, monkeypatch):
    monkeypatch.setattr(receiving, "REQUEST_S", 0.2)
    with socket.create_connection(("127.0.0.1", board.server_port), timeout=10) as slow:
        slow.sendall(b"POST /attempts HTTP/1.1\r\n")
        assert slow.recv(10) == b"", "it was closed"


def test_a_common_folder_is_a_board_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_BOARD", str(tmp_path / "common"))
    for seat, outcome in (("1", "right"), ("2", "wrong")):
        monkeypatch.setenv("QLORA_SEAT", seat)
        monkeypatch.setenv("QLORA_LEARNER", str(tmp_path / seat))
        record("one_step", outcome)
        sending.send()
    (tmp_path / "third.jsonl").write_text(json.dumps(line("3", "one_step", "right").__dict__) + "\n")
    (tmp_path / "common" / "link.jsonl").symlink_to(tmp_path / "third.jsonl")
    assert main(["board", str(tmp_path / "common"), "--page", str(tmp_path / "board.html")]) == 0
    assert "2 seats" in capsys.readouterr().out
    assert "<table>" in (tmp_path / "board.html").read_text(encoding="utf-8")


def test_a_bucket_is_a_board_too(monkeypatch):
    class Bucket:
        def __init__(self):
            self.kept = {}

        def put_object(self, *, Bucket, Key, Body):
            self.kept[Key] = Body

        def get_paginator(self, name):
            return self

        def paginate(self, *, Bucket, Prefix):
            return [{"Contents": [{"Key": key} for key in self.kept if key.startswith(Prefix)]}]

        def get_object(self, *, Bucket, Key):
            import io

            return {"Body": io.BytesIO(self.kept[Key])}

    bucket = Bucket()
    monkeypatch.setattr(collecting, "s3_client", lambda: bucket)
    monkeypatch.setenv("QLORA_BOARD", "s3://class/monday")
    record("one_step", "right")
    sending.send()
    assert [key.startswith("monday/seat-") for key in bucket.kept] == [True]
    assert [each.outcome for each in collecting.collect("s3://class/monday/").attempts] == ["right"]


def test_what_cannot_be_a_board_is_one_message(tmp_path, monkeypatch, capsys):
    for arguments in (
        ["board"],
        ["board", str(tmp_path / "none")],
        ["board", str(tmp_path), "--exercises", "nothing"],
        ["board", str(tmp_path), "--serve", "nowhere"],
        ["board", "s3://"],
        ["board", "--serve", "127.0.0.1:0", "s3://x/y"],
        ["board", str(tmp_path), "--release", "nothing"],
        ["board", str(tmp_path / "none"), "--release", "all"],
        ["board", str(tmp_path), "--show", "nothing"],
        ["board", "--share", "no-such-run"],
        ["board", "--predict", "no-such-run", "low"],
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: ")
    record("one_step", "right")
    monkeypatch.delenv("QLORA_BOARD", raising=False)
    with pytest.raises(UserError, match="there is no board"):
        sending.send()
    monkeypatch.setenv("QLORA_BOARD", "http://x@host:port")
    with pytest.raises(UserError, match="not an address"):
        sending.send()
