from __future__ import annotations

import os
import tarfile

import pytest

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tarball import write_tarball


def test_the_same_contents_give_the_same_bytes_and_name_nobody(tmp_path):
    source = tmp_path / "weights"
    source.write_bytes(b"w" * 100_000)
    first = write_tarball(tmp_path / "a" / "one.tar.gz", {"x/weights": source, "note.txt": b"hello"})
    os.utime(source, (1, 1))
    second = write_tarball(tmp_path / "two.tar.gz", {"x/weights": source, "note.txt": b"hello"})
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        assert archive.getnames() == ["x/weights", "note.txt"]
        assert archive.extractfile("x/weights").read() == b"w" * 100_000
        entry = archive.getmember("note.txt")
        assert (entry.uid, entry.uname, entry.mtime, entry.mode) == (0, "", 0, 0o644)
    header = first.read_bytes()[:10]
    assert (header[3], header[4:8]) == (0, b"\0\0\0\0")  # gzip: no file name, no time


def test_a_failure_keeps_the_old_archive_and_leaves_nothing_behind(tmp_path):
    out = tmp_path / "out.tar.gz"
    out.write_bytes(b"old")
    with pytest.raises(UserError, match="out.tar.gz could not be written"):
        write_tarball(out, {"a": b"1", "b": tmp_path / "missing"})
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.tar.gz"]
