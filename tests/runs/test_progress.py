"""Logged steps are one curve without gaps, however sessions end and whatever the file holds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest
from counted import growth
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers.base.errors import RunError
from qlora_helpers.runs.folder import Run, Status
from qlora_helpers.runs.progress import Progress


def steps(run) -> list[int]:
    return [record["step"] for record in run.progress()]


def test_a_resumed_session_supersedes_the_steps_it_repeats(run):
    assert run.progress() == []
    run.start_session(max_steps=8, resumed_from=0)
    for step in range(1, 6):
        run.append_progress({"session": 1, "step": step, "loss": 1.0})
    run.start_session(max_steps=8, resumed_from=3)
    run.append_progress({"session": 2, "step": 4, "loss": 2.0})
    assert steps(run) == [1, 2, 3, 4]
    run.start_session(max_steps=8, resumed_from=2)
    for step in range(3, 9):
        run.append_progress({"session": 3, "step": step, "loss": 3.0})
    assert steps(run) == [*range(1, 9)]
    assert [record["loss"] for record in run.progress()] == [1.0] * 2 + [3.0] * 6
    assert len(run.progress_path.read_text().splitlines()) == 3 + 5 + 1 + 6  # append only: nothing is lost


def test_a_half_written_line_is_the_only_one_that_is_lost(run):
    run.start_session(max_steps=8, resumed_from=0)
    run.append_progress({"step": 1, "loss": 1.0})
    run.append_progress({"step": 2, "loss": 1.0})
    content = run.progress_path.read_bytes()
    run.progress_path.write_bytes(content[:-9])
    assert steps(run) == [1]
    run.start_session(max_steps=8, resumed_from=1)
    run.append_progress({"step": 2, "loss": 2.0})
    assert steps(run) == [1, 2]
    assert json.loads(run.progress_path.read_text().splitlines()[-1])["loss"] == 2.0


@given(st.data())
def test_the_curve_has_no_gap_wherever_sessions_are_cut_off(tmp_path_factory, data):
    """Sessions end anywhere, some in the middle of a line; each goes on from a checkpoint at or before its last step."""
    run = Run(tmp_path_factory.mktemp("runs") / "cut")
    reached = 0
    for number in range(1, data.draw(st.integers(1, 4), "sessions") + 1):
        start = data.draw(st.integers(0, reached), "resumed from")
        reached = start + data.draw(st.integers(0, 4), "steps")
        run.append_progress({"event": "start", "session": number, "resumed_from": start})
        for step in range(start + 1, reached + 1):
            run.append_progress({"session": number, "step": step})
        if reached > start and data.draw(st.booleans(), "cut"):
            run.progress_path.write_bytes(run.progress_path.read_bytes()[: -data.draw(st.integers(2, 5), "bytes")])
            reached -= 1
    assert steps(run) == [*range(1, reached + 1)]


def test_lines_without_a_step_are_skipped(run):
    run.append_progress({"step": 1, "loss": 0.5})
    with open(run.progress_path, "ab") as file:
        file.write(b'[]\nnull\n\xff\xfe\n\n{}\n{"step": "two"}\n')
    run.append_progress({"step": 2, "loss": 0.25})
    assert steps(run) == [1, 2]


def test_values_that_are_not_json_are_refused(run):
    with pytest.raises(ValueError, match="JSON"):
        run.append_progress({"step": 1, "loss": float("nan")})
    assert run.progress() == []


def test_a_full_disk_is_reported_when_progress_is_written(run, monkeypatch):
    run.append_progress({"step": 1})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        with pytest.raises(RunError, match=r"progress\.jsonl could not be written \(No space left"):
            run.append_progress({"step": 2})
    assert steps(run) == [1]


def test_viewers_read_while_the_trainer_writes(run):
    """A reader never sees a half-written status or line."""
    code = (
        "import sys\nfrom qlora_helpers.runs.folder import Run\nrun = Run(sys.argv[1])\nrun.start_session(200, 0)\n"
        "for step in range(1, 201):\n"
        "    run.append_progress({'step': step, 'loss': 1 / step})\n    run.set_status(step=step)\n"
        "run.set_status(state='finished')"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(run.folder)])
    seen = 0
    with contextlib.ExitStack() as stack:
        stack.callback(writer.kill)
        while writer.poll() is None:
            assert run.status().state in ("new", "starting", "running", "finished", "dead")
            reached = steps(run)
            assert reached == [*range(1, len(reached) + 1)]
            seen += 0 < len(reached) < 200
    assert writer.returncode == 0
    assert steps(run) == [*range(1, 201)]
    assert run.status() == Status(**{**vars(run.status()), "state": "finished", "step": 200})
    assert seen


def append(path, *records) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_a_reader_returns_only_what_is_new(tmp_path):
    path = tmp_path / "progress.jsonl"
    progress = Progress(path)
    assert progress.read() == []
    append(path, {"step": 1}, {"step": 2})
    assert progress.read() == [{"step": 1}, {"step": 2}]
    assert progress.read() == []
    append(path, {"step": 3})
    assert progress.read() == [{"step": 3}]
    assert progress.records == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert progress.generation == 0


def test_superseded_records_are_taken_back(tmp_path):
    path = tmp_path / "progress.jsonl"
    progress = Progress(path)
    append(path, {"step": 1}, {"step": 2}, {"step": 3})
    progress.read()
    append(path, {"event": "start", "resumed_from": 3}, {"step": 4})
    assert progress.read() == [{"step": 4}]
    assert progress.generation == 0  # nothing was superseded: what was drawn stays valid
    append(path, {"event": "start", "resumed_from": 2}, {"step": 3, "session": 2})
    assert progress.read() == [{"step": 3, "session": 2}]
    assert progress.records == [{"step": 1}, {"step": 2}, {"step": 3, "session": 2}]
    assert progress.generation == 1


def test_records_that_are_superseded_within_one_read_are_not_new(tmp_path):
    path = tmp_path / "progress.jsonl"
    progress = Progress(path)
    append(path, {"step": 1}, {"step": 2}, {"event": "start", "resumed_from": 1}, {"step": 2, "session": 2})
    assert progress.read() == [{"step": 1}, {"step": 2, "session": 2}]
    assert progress.records == [{"step": 1}, {"step": 2, "session": 2}]


def test_what_else_happened_is_kept_apart_from_the_steps(tmp_path):
    path = tmp_path / "progress.jsonl"
    progress = Progress(path)
    append(path, {"event": "start", "resumed_from": 0}, {"step": 1}, {"event": "saved", "step": 1}, {"step": 2})
    append(path, {"event": "saved", "step": 2})
    assert progress.read() == [{"step": 1}, {"step": 2}]
    assert progress.events == [("saved", 1), ("saved", 2)]
    append(path, {"event": "start", "resumed_from": 1}, {"step": 2, "session": 2}, {"event": "saved", "step": "2"})
    assert progress.read() == [{"step": 2, "session": 2}]
    assert progress.events == [("saved", 1), ("resumed", 1)]
    whole = Progress(path)
    whole.read()
    assert (whole.records, whole.events) == (progress.records, progress.events)


def test_a_start_without_a_step_supersedes_everything(tmp_path):
    path = tmp_path / "progress.jsonl"
    progress = Progress(path)
    append(path, {"step": 1}, {"event": "start"}, {"step": 1, "session": 2})
    assert progress.read() == [{"step": 1, "session": 2}]


def test_a_file_that_shrinks_is_read_from_its_beginning(tmp_path):
    path = tmp_path / "progress.jsonl"
    progress = Progress(path)
    append(path, {"step": 1}, {"step": 2}, {"step": 3})
    progress.read()
    inode = path.stat().st_ino
    with open(path, "r+", encoding="utf-8") as file:  # the same file, shorter
        file.truncate()
        file.write('{"step": 9}\n')
    assert path.stat().st_ino == inode
    assert progress.read() == [{"step": 9}]
    assert progress.records == [{"step": 9}]
    assert progress.generation == 1


def test_a_file_that_is_replaced_is_read_from_its_beginning(tmp_path):
    path, other = tmp_path / "progress.jsonl", tmp_path / "other.jsonl"
    progress = Progress(path)
    append(path, {"step": 1})
    progress.read()
    append(other, {"step": 5}, {"step": 6}, {"step": 7})
    os.replace(other, path)
    assert progress.read() == [{"step": 5}, {"step": 6}, {"step": 7}]
    assert progress.generation == 1


def test_an_unfinished_line_waits_unless_the_reader_reads_to_the_end(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    progress = Progress(path)
    assert progress.read() == [{"step": 1}]
    assert progress.read(to_end=True) == [{"step": 2}]
    assert Progress(path).read(to_end=True) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("value", ["high", True, None, [1.0], 1e301, float("nan"), float("inf")])
def test_a_value_that_is_not_a_finite_number_is_dropped_from_its_line(tmp_path, value):
    path = tmp_path / "progress.jsonl"
    append(path, {"step": 1, "loss": value, "eval_loss": 0.5, "note": "kept"})
    assert Progress(path).read() == [{"step": 1, "eval_loss": 0.5, "note": "kept"}]


KINDS = {
    "steps": lambda number: [{"step": number}],
    "starts that supersede nothing": lambda number: [{"step": 1}, {"event": "start", "resumed_from": 10**6}],
    "starts that supersede one step": lambda number: [
        {"step": number},
        {"step": 10**6},
        {"event": "start", "resumed_from": 10**5},
    ],
    "starts from the end to the beginning": lambda number: [
        {"step": number},
        {"event": "start", "resumed_from": number},
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_reading_costs_as_much_as_the_file_is_long(tmp_path, kind):
    """A file of 1.1 MB with a start on every second line took 23 s."""

    def work(size):
        path = tmp_path / f"{size}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for number in range(size) for line in KINDS[kind](number)))
        return lambda: Progress(path).read(to_end=True)

    assert growth(work, 200) < 5


def test_starts_and_steps_in_any_order_are_read_as_one_after_the_other(tmp_path):
    """The one pass from the end keeps what reading line by line keeps, in one look or several."""
    import random

    draw = random.Random(0)
    for case in range(200):
        lines = [
            {"event": "start", "resumed_from": draw.randrange(6)}
            if draw.random() < 0.4
            else {"step": draw.randrange(8)}
            for _ in range(draw.randrange(12))
        ]
        expected: list[dict] = []
        for line in lines:
            if "event" in line:
                expected = [old for old in expected if old["step"] <= line["resumed_from"]]
            else:
                expected.append(line)
        path = tmp_path / f"{case}.jsonl"
        whole, parts = Progress(path), Progress(path)
        for line in lines:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
            if draw.random() < 0.5:
                parts.read()
        parts.read()
        whole.read()
        assert whole.records == parts.records == expected
