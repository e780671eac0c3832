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

_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


@contextlib.contextmanager
def _opened_parent(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yields the descriptor of the folder that `path` lies in, and its name there."""
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
    with _opened_parent(path, root) as (parent, name):
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)


def rename(path: Path, to: Path, *, root: Path) -> None:
    """Renames a file or folder below `root`, and replaces a file or an empty folder that has the new name.

    Raises:
        OSError: a folder on either way is a link, or it can't be renamed.
    """
    with _opened_parent(path, root) as (parent, name), _opened_parent(to, root) as (new_parent, new_name):
        os.replace(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)


def read_regular(path: Path) -> bytes:
    """Reads a regular file.

    Raises:
        OSError: it is a link or something else that is no regular file.
    """
    # O_NONBLOCK: a pipe without a writer would hold the process up.
    handle = os.open(path, os.O_RDONLY | _NO_LINK | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path.name} is not a regular file")
        return file.read()


def copy_regular(path: Path, to: Path) -> None:
    """Copies the content of a regular file.

    Raises:
        OSError: it is a link or something else that is no regular file; nothing is written.
    """
    handle = os.open(path, os.O_RDONLY | _NO_LINK | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path.name} is not a regular file")
        with open(to, "wb") as copy:
            shutil.copyfileobj(file, copy, 1024**2)
