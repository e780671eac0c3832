"""Nothing is deleted, renamed or copied through a link."""

from __future__ import annotations

import os

import pytest

from qlora_helpers.base.folders import copy_regular, read_regular, remove, rename


@pytest.fixture
def place(tmp_path):
    """A run's folder with a checkpoint, and something precious beside it."""
    run, precious = tmp_path / "run", tmp_path / "precious"
    (run / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-2" / "weights").write_text("w")
    (precious / "checkpoint-2").mkdir(parents=True)
    (precious / "checkpoint-2" / "weights").write_text("mine")
    return run, precious


def led_away(run, precious):
    """Puts a link in the place of a folder, as somebody may do after the run was looked at."""
    (run / "checkpoints").rename(run / "aside")
    (run / "checkpoints").symlink_to(precious)


def test_what_is_below_the_root_is_deleted_and_renamed(place):
    run, _ = place
    rename(run / "checkpoints" / "checkpoint-2", run / "checkpoints" / "checkpoint-3", root=run)
    assert os.listdir(run / "checkpoints") == ["checkpoint-3"]
    remove(run / "checkpoints" / "checkpoint-3", root=run)
    assert os.listdir(run / "checkpoints") == []
    (run / "log.txt").touch()
    remove(run / "log.txt", root=run)
    with pytest.raises(FileNotFoundError):
        remove(run / "log.txt", root=run)


def test_nothing_happens_behind_a_folder_that_became_a_link(place):
    run, precious = place
    led_away(run, precious)
    for act in (
        lambda: remove(run / "checkpoints" / "checkpoint-2", root=run),
        lambda: rename(run / "checkpoints" / "checkpoint-2", run / "checkpoints" / "old", root=run),
        lambda: rename(run / "aside", run / "checkpoints" / "aside", root=run),
    ):
        with pytest.raises(OSError, match="checkpoints"):
            act()
    assert (precious / "checkpoint-2" / "weights").read_text() == "mine" and os.listdir(precious) == ["checkpoint-2"]


def test_a_link_is_deleted_and_not_what_it_leads_to(place):
    run, precious = place
    led_away(run, precious)
    remove(run / "checkpoints", root=run)
    assert (precious / "checkpoint-2" / "weights").exists() and not os.path.lexists(run / "checkpoints")


def test_a_path_that_leads_out_of_its_root_is_refused(place):
    run, precious = place
    with pytest.raises(OSError, match="leads out of"):
        remove(run / ".." / "precious" / "checkpoint-2", root=run)
    with pytest.raises(ValueError, match="precious"):
        remove(precious / "checkpoint-2", root=run)
    assert (precious / "checkpoint-2" / "weights").exists()


def test_the_root_itself_may_be_a_link(place, tmp_path):
    run, _ = place
    (tmp_path / "by-link").symlink_to(run)
    remove(tmp_path / "by-link" / "checkpoints", root=tmp_path / "by-link")
    assert os.listdir(run) == []


def test_only_regular_files_are_copied_and_read(place, tmp_path):
    run, precious = place
    (run / "token").symlink_to(precious / "checkpoint-2" / "weights")
    os.mkfifo(run / "pipe")
    for name in ("token", "pipe", "checkpoints"):
        with pytest.raises(OSError, match="."):
            copy_regular(run / name, tmp_path / "copy")
        with pytest.raises(OSError, match="."):
            read_regular(run / name)
    assert not (tmp_path / "copy").exists()
    copy_regular(precious / "checkpoint-2" / "weights", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "mine"


def test_nothing_is_read_behind_a_folder_that_became_a_link(tmp_path):
    """Events are uploaded: what lies behind a link that appeared meanwhile must not be."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "events.1").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="events"):
        read_regular(tmp_path / "run" / "events" / "events.1", root=tmp_path / "run")
    (tmp_path / "run" / "events").unlink()
    (tmp_path / "precious").rename(tmp_path / "run" / "events")
    assert read_regular(tmp_path / "run" / "events" / "events.1", root=tmp_path / "run") == b"mine"
