"""Deletes, renames and copies what lies below a folder without ever following a link out of it.

Each step goes through the descriptor of the folder above, opened without following links. So a part of the path that somebody
replaces by a link, before or meanwhile, ends in an `OSError` instead of in another folder. The root itself may be a link: it is
where its owner put it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer would hold the process up


@contextlib.contextmanager
def opened_parent(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yields the descriptor of the folder that `path` lies in, and its name there.

    Raises:
        OSError: a folder between root and path is a link, or is missing.
    """
    *folders, name = path.relative_to(root).parts
    if ".." in (*folders, name):
        raise OSError(f"{path} leads out of {root}")
    handle = os.open(root, _FOLDER)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER | _NO_LINK, dir_fd=handle)
            os.close(handle)
            handle = inner
        yield handle, name
    finally:
        os.close(handle)


def remove(path: Path, *, root: Path) -> None:
    """Deletes a file, a link or a whole folder below `root`; a link is deleted, never what it leads to.

    Raises:
        FileNotFoundError: it does not exist.
        OSError: a folder between root and path is a link, or something can't be deleted.
    """
    with opened_parent(path, root) as (parent, name):
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)


def rename(path: Path, to: Path, *, root: Path) -> None:
    """Renames a file or folder below `root`, and replaces a file or an empty folder that has the new name.

    Raises:
        OSError: a folder on either way is a link, or it can't be renamed.
    """
    with opened_parent(path, root) as (parent, name), opened_parent(to, root) as (new_parent, new_name):
        os.replace(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Opens a regular file to read it, and never waits for one that is something else, such as a pipe.

    Args:
        path: the file.
        follow: whether it may be a link to a regular file.

    Raises:
        OSError: it is something else.
    """
    return _regular(os.open(path, _READ | (0 if follow else _NO_LINK)), path)


def _regular(handle: int, path: Path) -> BinaryIO:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path.name} is not a regular file")
    return os.fdopen(handle, "rb")


def read_regular(path: Path, *, root: Path | None = None) -> bytes:
    """Reads a regular file.

    Args:
        path: the file.
        root: a folder that it lies below; no folder between them may be a link.

    Raises:
        OSError: it, or a folder on the way, is a link; or it is something else that is no regular file.
    """
    with opened_parent(path, root or path.parent) as (parent, name):
        handle = os.open(name, _READ | _NO_LINK, dir_fd=parent)
    with _regular(handle, path) as file:
        return file.read()


def copy_regular(path: Path, to: Path) -> None:
    """Copies the content of a regular file.

    Raises:
        OSError: it is a link or something else that is no regular file; nothing is written.
    """
    with open_regular(path, follow=False) as file, open(to, "wb") as copy:
        shutil.copyfileobj(file, copy, 1024**2)
