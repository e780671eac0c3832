"""A run folder that came from somebody else leads nowhere: links in it are refused, and its files name no paths."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess

import pytest
from fake_run import finished_run

from qlora_helpers.__main__ import main
from qlora_helpers.base.errors import RunError
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import open_to_append, refuse_links
from qlora_helpers.runs.launch import start
from qlora_helpers.runs.log import logged_to
from qlora_helpers.runs.opening import existing_run, open_run
from qlora_helpers.runs.session import training_session
from qlora_helpers.views.follow import last_lines


@pytest.fixture
def theirs(tmp_path):
    """A finished run, beside something precious."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes").write_text("mine\n")
    return finished_run(tmp_path / "runs")


LINKS = ["log.txt", "progress.jsonl", "checkpoints", "requests", "events", "adapter/adapter_config.json", "data/more"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_run_folder_is_refused_at_every_entrance(theirs, tmp_path, name, capsys):
    place = theirs.folder / name
    if place.is_dir():
        place.rename(tmp_path / "aside")
    elif place.exists():
        place.unlink()
    place.parent.mkdir(exist_ok=True)
    target = tmp_path / "precious" / ("notes" if "." in name else "")
    place.symlink_to(os.path.relpath(target, place.parent))
    entrances = [
        lambda: open_run(theirs.folder),
        lambda: existing_run(theirs.folder),
        lambda: start(theirs),
        lambda: training_session(theirs).__enter__(),
    ]
    for enter in entrances:
        with pytest.raises(RunError, match=f"neither a regular file nor a folder.*{name}"):
            enter()
    assert main(["train", str(theirs.folder)]) == 2
    assert "Delete these entries" in capsys.readouterr().err
    assert (tmp_path / "precious" / "notes").read_text() == "mine\n"
    assert sorted(os.listdir(tmp_path / "precious")) == ["notes"]


def test_a_pipe_is_refused_and_many_entries_are_counted(theirs):
    for number in range(5):
        os.mkfifo(theirs.folder / f"pipe-{number}")
    with pytest.raises(RunError, match="pipe-0, pipe-1, pipe-2 and more"):
        refuse_links(theirs.folder)


def test_regular_files_and_a_link_to_the_folder_itself_are_fine(theirs, tmp_path):
    refuse_links(theirs.folder)
    refuse_links(tmp_path / "nothing")
    (tmp_path / "by-link").symlink_to(theirs.folder)
    assert existing_run(tmp_path / "by-link").config() == theirs.config()


def test_a_link_that_appears_later_is_not_written_through(run, tmp_path):
    target = tmp_path / "notes"
    target.write_text("mine\n")
    run.folder.mkdir(parents=True)
    run.progress_path.symlink_to(target)
    with pytest.raises(RunError, match="progress.jsonl"):
        run.append_progress({"step": 1})
    run.log_path.symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"), logged_to(run.log_path):
        pass
    with pytest.raises(OSError, match="symbolic links"):
        open_to_append(run.log_path)
    assert target.read_text() == "mine\n"


def test_a_request_names_no_path(tmp_path):
    """The answer to a request is written to the request's own file, whatever that file says of its name."""
    run = Run(tmp_path / "mine")
    session = run.start_session(max_steps=10, resumed_from=0)
    victim = tmp_path / "victim.json"
    victim.write_text("precious")
    run.requests_dir.mkdir(exist_ok=True)
    for number, name in enumerate((str(victim)[:-5], "../../victim", "../victim")):
        values = {"id": name, "kind": "save", "session": session, "asked_at": 1.0}
        (run.requests_dir / f"{number}-save.json").write_text(json.dumps(values))
    run.requests.receive(session)
    run.requests.acknowledge_all("done")
    assert victim.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == [
        "0-save.json",
        "1-save.json",
        "2-save.json",
        "status.json",
        "victim.json",
    ]
    assert [request.answer for request in run.requests] == ["done"] * 3


def test_folders_deeper_than_a_run_s_are_refused_in_one_message(theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(theirs.folder)
    for _ in range(1500):  # deeper than a path or Python's stack can be
        os.mkdir("d")
        os.chdir("d")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="at most 20 inside each other; got d/d/d"):
        existing_run(theirs.folder)
    subprocess.run(["rm", "-rf", str(theirs.folder / "d")], check=True)


@pytest.mark.parametrize("name", ["status.json", "config.json", "progress.jsonl", "log.txt", "requests/1-stop.json"])
def test_a_pipe_that_appears_later_holds_nobody_up(theirs, name):
    """Whoever waits for a pipe without a writer waits forever: a panel, `clean`, the trainer's heartbeat."""
    place = theirs.folder / name
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    os.mkfifo(place)
    readers = {
        "status.json": theirs.status,
        "config.json": theirs.config,
        "progress.jsonl": theirs.progress,
        "log.txt": lambda: open_to_append(place),
    }
    if name in readers:
        with pytest.raises((RunError, OSError)):
            readers[name]()
    else:
        assert list(theirs.requests) == []
    assert last_lines(theirs.log_path) == ()


def test_a_file_with_a_hole_takes_no_memory(theirs):
    with open(theirs.status_path, "wb") as file:
        file.truncate(2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RunError, match="status.json is damaged .it is larger than 512 MiB"):
        theirs.status()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024**2  # KiB


def test_requests_and_progress_that_became_links_are_not_followed(theirs, tmp_path):
    """What lies there is neither read nor answered, and nothing is put there."""
    (tmp_path / "precious" / "1-stop.json").write_text('{"id": "x", "kind": "stop", "session": 0, "asked_at": 1}')
    (tmp_path / "precious" / "lines").write_text('{"step": 1, "loss": 3}\n')
    before = {path.name: path.read_text() for path in (tmp_path / "precious").iterdir()}
    shutil.rmtree(theirs.requests_dir, ignore_errors=True)
    theirs.requests_dir.symlink_to(tmp_path / "precious")
    assert list(theirs.requests) == [] and theirs.requests.pending(5) == []
    with pytest.raises(RunError, match="could not be written"):
        theirs.requests.add("stop", 1)
    theirs.progress_path.unlink()
    theirs.progress_path.symlink_to(tmp_path / "precious" / "lines")
    with pytest.raises(RunError, match="progress.jsonl can't be read"):
        theirs.progress()
    assert {path.name: path.read_text() for path in (tmp_path / "precious").iterdir()} == before
