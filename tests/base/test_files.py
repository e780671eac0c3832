"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys

import pytest
from two_users import NOBODY, needs_root

from qlora_helpers.base import files
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import cache_root, read_json, replaced_folder, write_json, write_text


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that is full when a file is to reach it."""

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.0})
    for value in ({"loss": float("nan")}, {"loss": float("inf")}, {"what": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, value)
    assert read_json(path) == {"loss": 1.0}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("failing", ["open", "mkdir"])
def test_a_folder_that_cannot_be_written_is_reported(tmp_path, monkeypatch, failing):
    """Such as a disk without inodes, or a folder of somebody else."""
    if failing == "mkdir":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "a.txt"
    else:
        path = tmp_path / "a.txt"

        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(files, "open", refuse, raising=False)
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


def test_missing_and_damaged_files_are_reported(tmp_path):
    path = tmp_path / "status.json"
    with pytest.raises(RunError, match=r"status\.json is not in "):
        read_json(path)
    for content in (b"{", b"", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(RunError, match="is damaged"):
            read_json(path)


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


def test_the_old_folder_is_restored_if_the_new_one_cannot_replace_it(tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "old").touch()
    replace, calls = os.replace, []

    def failing(source, target, **folders):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target, **folders)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output error"), replaced_folder(path) as folder:
        (folder / "new").touch()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"No space left on device\)\. Free some space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), r"No space left on device\)\. Free some"),
        (PermissionError(errno.EACCES, "Permission denied"), r"Permission denied\)\. Check who may write there"),
        (OSError(errno.EROFS, "Read-only file system"), r"Read-only file system\)\. Check who may write there"),
    ],
)
def test_a_folder_that_the_disk_refuses_is_one_message_and_the_old_one_stays(tmp_path, error, expected):
    path = tmp_path / "data"
    with replaced_folder(path) as folder:
        (folder / "old").touch()
    with pytest.raises(RunError, match=rf"data could not be written \({expected}"), replaced_folder(path) as folder:
        raise error
    assert names(path) == ["old"] and names(tmp_path) == ["data"]
    with pytest.raises(RunError, match="out could not be written"), replaced_folder(path / "old" / "out"):
        pass


@pytest.fixture
def umask():
    """Sets the umask, and restores it after the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_a_private_umask_keeps_files_private(tmp_path, umask):
    umask(0o077)
    write_text(tmp_path / "new" / "a.txt", "mine")
    with replaced_folder(tmp_path / "adapter") as folder:
        (folder / "weights").touch()
    open_to_others = [path for path in tmp_path.rglob("*") if path.stat().st_mode & 0o077]
    assert open_to_others == [] and (tmp_path / "adapter" / "weights").exists()


def test_what_is_replaced_keeps_its_rights(tmp_path, umask):
    umask(0o022)
    path, folder = tmp_path / "a.txt", tmp_path / "adapter"
    path.touch(mode=0o600)
    folder.mkdir(mode=0o700)
    write_text(path, "mine")
    with replaced_folder(folder):
        pass
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, folder)] == [0o600, 0o700]


def test_what_is_put_into_a_folder_while_it_is_replaced_is_kept(tmp_path):
    """An export takes an hour, and the folder that it will replace is there for everybody to use."""
    path = tmp_path / "results"
    with replaced_folder(path) as folder:
        (folder / "export.json").write_text("first")
    with replaced_folder(path) as folder:
        (folder / "export.json").write_text("second")
        (path / "notes.txt").write_text("an hour of work")
        (path / "plots").mkdir()
        (path / "plots" / "loss.png").touch()
    assert names(path) == ["export.json", "notes.txt", "plots"] and names(path / "plots") == ["loss.png"]
    assert (path / "export.json").read_text() == "second"
    assert names(tmp_path) == ["results"]


def test_what_is_changed_while_a_folder_is_replaced_is_kept_beside_it(tmp_path):
    path = tmp_path / "results"
    (path / "adapter").mkdir(parents=True)
    (path / "adapter" / "README.md").write_text("old")

    def write_anew() -> None:
        with replaced_folder(path) as folder:
            (folder / "adapter").mkdir()
            (path / "adapter" / "README.md").write_text("edited by hand")

    with pytest.warns(UserWarning, match=r"its old content is in results\.kept-1/"):
        write_anew()
    assert names(path / "adapter") == []
    assert (tmp_path / "results.kept-1" / "adapter" / "README.md").read_text() == "edited by hand"
    assert names(tmp_path) == ["results", "results.kept-1"]


def test_no_folder_between_the_root_and_a_file_may_be_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "requests").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"1.json could not be written"):
        write_json(tmp_path / "run" / "requests" / "1.json", {}, root=tmp_path / "run")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "by-link").symlink_to(tmp_path / "run")  # the root itself may be one
    write_json(tmp_path / "by-link" / "more" / "1.json", {}, root=tmp_path / "by-link")
    assert (tmp_path / "run" / "more" / "1.json").read_text() == "{}\n"


@needs_root
def test_a_cache_of_another_user_in_a_shared_hub_cache_is_passed_over(tmp_path, monkeypatch):
    """Whoever may write in a cache decides which weights are loaded from it, and which buckets count as confirmed."""
    monkeypatch.delenv("QLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "shared"))
    place, own = tmp_path / "shared" / "qlora_helpers", tmp_path / "home" / ".cache" / "qlora_helpers"
    assert cache_root() == place
    place.mkdir(parents=True)
    assert cache_root() == place
    os.chown(place, NOBODY, NOBODY)
    assert cache_root() == own
    os.chown(place, os.geteuid(), os.getegid())
    place.chmod(0o777)
    assert cache_root() == own
    monkeypatch.setenv("QLORA_CACHE", str(place))  # a person's own choice
    assert cache_root() == place
