"""The run folder: whole files or none, a true status, requests that reach the right session, one gapless curve."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import read_json, replaced_folder, write_json, write_text
from qlora_helpers.runs.folder import Run, Status
from qlora_helpers.runs.opening import find_runs


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that is full when a file is to reach it."""

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# files


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "first\n")
    write_text(path, "sécond 🎂\n")
    assert path.read_bytes() == "sécond 🎂\n".encode()
    assert names(path.parent) == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # a person with whom the space is shared may read it


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path, full_disk):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RunError, match=r"a\.txt could not be written \(No space left on device\)\. Free some space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.0})
    for value in ({"loss": float("nan")}, {"loss": float("inf")}, {"what": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, value)
    assert read_json(path) == {"loss": 1.0}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("failing", ["mkstemp", "mkdir"])
def test_a_folder_that_takes_no_file_is_told(tmp_path, monkeypatch, failing):
    """Such as a disk without inodes, or a folder of somebody else."""
    if failing == "mkdir":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "a.txt"
    else:
        path = tmp_path / "a.txt"

        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(RunError, match=r"a\.txt could not be written"):
        write_text(path, "new")


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"n": 0})
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom qlora_helpers.base.files import write_json\n"
        "os.fsync = lambda handle: os._exit(9)\nwrite_json(Path(sys.argv[1]), {'n': 1})"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert read_json(path) == {"n": 0}


def test_missing_and_damaged_files_are_told(tmp_path):
    path = tmp_path / "status.json"
    with pytest.raises(RunError, match=r"status\.json is not in "):
        read_json(path)
    for content in (b"{", b"", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(RunError, match="is damaged"):
            read_json(path)


# folders


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "adapter"
    with replaced_folder(path) as folder:
        (folder / "first").touch()
        assert not path.exists()
    assert names(path) == ["first"]
    with pytest.raises(FileExistsError), replaced_folder(path) as folder:
        (folder / "half").mkdir() or (folder / "half").mkdir()
    assert names(path) == ["first"]
    with replaced_folder(path) as folder:
        (folder / "second").touch()
        assert names(path) == ["first"]  # the old one is there until the new one is done
    assert names(path) == ["second"]
    assert names(tmp_path) == ["adapter"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "old").touch()
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output error"), replaced_folder(path) as folder:
        (folder / "new").touch()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["adapter"]


# names


@pytest.mark.parametrize("name", ["demo", "A", "7b_r8.lr-1e-3", "x" * 100])
def test_names(tmp_path, name):
    assert Run(tmp_path / name).name == name


@pytest.mark.parametrize("name", ["..", ".", "", ".hidden", "-rf", "a b", "a\n", "ä", "a:b", "a\0b", "x" * 101, "a*"])
def test_no_names(tmp_path, name):
    with pytest.raises(RunError, match="this can't be the name of a run"):
        Run(f"{tmp_path}/{name}" if name not in ("", ".") else name)


# configuration


def test_the_configuration_is_what_was_saved(run):
    assert not run.exists()
    with pytest.raises(RunError, match=r"the run 'mine' does not exist yet\. Run notebook 00_setup"):
        run.config()
    config = RunConfig().with_settings({"train.max_steps": 7, "adapter.target_modules": ["q_proj"]})
    run.save_config(config)
    assert run.exists()
    assert run.config() == config


def test_a_damaged_configuration_is_told(run):
    run.folder.mkdir(parents=True)
    for content in ("{", "[]", '{"train": {"max_steps": -1}}', '{"modle": {}}', '"text"', "null"):
        run.config_path.write_text(content)
        with pytest.raises(UserError):
            run.config()


def test_a_missing_product_names_what_makes_it(run):
    with pytest.raises(RunError, match=r"mine/adapter is not there yet\. Notebook 04_train makes it; run that first\."):
        run.need(run.adapter_dir, "Notebook 04_train")
    run.adapter_dir.mkdir(parents=True)
    assert run.need(run.adapter_dir, "Notebook 04_train") == run.adapter_dir


def test_several_runs_side_by_side(tmp_path):
    runs = [Run(tmp_path / name) for name in ("b", "a")]
    for number, run in enumerate(runs):
        run.save_config(RunConfig().with_settings({"train.max_steps": number + 1}))
        run.start_session(max_steps=number + 1, resumed_from=0)
        run.append_progress({"step": 1, "loss": float(number)})
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").touch()
    write_json(tmp_path / ".hidden" / "config.json", {})
    runs[0].request("stop")
    found = find_runs(tmp_path)
    assert [run.name for run in found] == ["a", "b"]
    assert [run.config().train.max_steps for run in found] == [2, 1]
    assert [run.progress()[0]["loss"] for run in found] == [1.0, 0.0]
    assert [len(list(run.requests)) for run in found] == [0, 1]
    assert find_runs(tmp_path / "nothing") == []


# status


def ended_process() -> int:
    """The id of a process that has ended and was waited for: nobody has it."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_session_of_training_in_its_status(run):
    assert run.status() == Status()
    assert repr(run) == "Run('mine', new)"
    assert run.start_session(max_steps=10, resumed_from=0) == 1
    status = run.status()
    assert (status.state, status.step, status.max_steps, status.session) == ("running", 0, 10, 1)
    assert (status.pid, status.host) == (os.getpid(), socket.gethostname())
    assert abs(status.heartbeat - time.time()) < 10
    run.set_status(step=4)
    assert run.status().step == 4
    run.set_status(state="stopped", exit_reason="stopped and saved by request")
    assert run.start_session(max_steps=10, resumed_from=4) == 2
    status = run.status()
    assert (status.state, status.step, status.session, status.exit_reason) == ("running", 4, 2, None)


def test_an_unknown_state_is_a_fault_of_ours(run):
    with pytest.raises(ValueError, match="got 'sleeping'"):
        run.set_status(state="sleeping")
    assert not run.status_path.exists()


def test_fields_of_a_later_version_are_passed_over(run):
    write_json(run.status_path, {"state": "finished", "step": 3, "mood": "good"})
    assert run.status() == Status(state="finished", step=3)


def test_a_process_that_is_gone_is_told_as_dead(run):
    run.start_session(max_steps=10, resumed_from=0)
    run.set_status(pid=ended_process(), step=3)
    status = run.status()
    assert (status.state, status.step) == ("dead", 3)
    assert status.exit_reason == "the trainer's process ended without reporting why"
    with pytest.raises(RunError, match="the run 'mine' is dead"):
        run.request("stop")
    assert run.start_session(max_steps=10, resumed_from=2) == 2
    assert run.status().state == "running"


def test_a_killed_process_that_nobody_waited_for_is_dead_too(run):
    """A kernel that started the trainer and does not ask after it keeps its entry in the process table."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    try:
        run.start_session(max_steps=10, resumed_from=0)
        run.set_status(pid=process.pid)
        assert run.status().state == "running"
        process.kill()
        for _ in range(100):
            if run.status().state == "dead":
                break
            time.sleep(0.05)
        assert run.status().state == "dead"
    finally:
        process.kill()
        process.communicate()


def test_a_later_process_with_the_same_number_is_not_the_trainer(run):
    """After a restart of the machine the old number belongs to somebody else."""
    run.start_session(max_steps=10, resumed_from=0)
    values = read_json(run.status_path)
    write_json(run.status_path, values | {"heartbeat": values["heartbeat"] - 365 * 86400})
    assert run.status().state == "dead"


def test_a_trainer_elsewhere_lives_as_long_as_its_heart_beats(run):
    run.start_session(max_steps=10, resumed_from=0)
    run.set_status(host="another-machine", pid=ended_process())
    assert run.status().state == "running"
    write_json(run.status_path, read_json(run.status_path) | {"heartbeat": time.time() - 120})
    assert run.status().state == "dead"
    run.set_status(step=1)  # a late sign of life
    assert run.status().state == "running"


@pytest.mark.parametrize("content", ["[]", "null", "7", '"running"', "{"])
def test_a_damaged_status_is_told(run, content):
    run.folder.mkdir(parents=True)
    run.status_path.write_text(content)
    with pytest.raises(RunError, match=r"status\.json is damaged"):
        run.status()


# progress


def steps(run) -> list[int]:
    return [record["step"] for record in run.progress()]


def test_a_resumed_session_supersedes_the_steps_it_does_again(run):
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


def test_a_line_that_was_left_half_written_costs_itself_alone(run):
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
def test_however_a_run_is_cut_off_its_curve_has_no_gap(tmp_path_factory, data):
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


def test_other_lines_are_passed_over(run):
    run.append_progress({"step": 1, "loss": 0.5})
    with open(run.progress_path, "ab") as file:
        file.write(b'[]\nnull\n\xff\xfe\n\n{}\n{"step": "two"}\n')
    run.append_progress({"step": 2, "loss": 0.25})
    assert steps(run) == [1, 2]


def test_a_line_of_progress_holds_json_alone(run):
    with pytest.raises(ValueError, match="JSON"):
        run.append_progress({"step": 1, "loss": float("nan")})
    assert run.progress() == []


def test_a_full_disk_is_told_when_progress_is_written(run, monkeypatch):
    run.append_progress({"step": 1})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        with pytest.raises(RunError, match=r"progress\.jsonl could not be written \(No space left"):
            run.append_progress({"step": 2})
    assert steps(run) == [1]


# requests


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


def test_a_file_that_is_no_request_is_passed_over(run):
    session = run.start_session(max_steps=10, resumed_from=0)
    asked = run.request("save")
    for name, content in {"1-a": "{", "2-b": "[]", "3-c": '{"kind": "stop"}', "4-d": "null", "x": "{}"}.items():
        (run.requests_dir / f"{name}.json").write_text(content)
    assert run.requests.pending(session) == [asked]


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
