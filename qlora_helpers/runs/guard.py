"""Refuses a run folder that leads somewhere else: what lies in it must be regular files and folders.

A run folder may come from somebody else. A link in it would have this run's log, progress, checkpoints or events written into, read
from or deleted in a place that its maker chose. The run's folder itself may be a link: it is where its owner put it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO, Any

from qlora_helpers.base.errors import RunError

MOST_NAMED = 3
DEEPEST = 20  # folders inside each other; a run has five


def refuse_links(folder: Path) -> None:
    """Looks at everything below a run's folder.

    Raises:
        RunError: something there is a link, a device, a pipe or a socket, or lies deeper than a run's folders do; nothing was
            followed or changed.
    """
    found = list(_foreign(folder))
    if found:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:MOST_NAMED])
        raise RunError(
            f"the run folder {folder.name!r} holds what is neither a regular file nor a folder",
            expected=f"regular files and folders, as a run writes them, at most {DEEPEST} inside each other",
            got=names + (" and more" if len(found) > MOST_NAMED else ""),
            next_step="Delete these entries, or copy what they lead to into their place.",
        )


def _foreign(folder: Path) -> list[Path]:
    found, left = [], [(folder, 0)]
    while left:
        inside, depth = left.pop()
        try:
            entries = list(os.scandir(inside))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and depth < DEEPEST:
                left.append((Path(entry.path), depth + 1))
            elif not stat.S_ISREG(mode):
                found.append(Path(entry.path))
    return sorted(found)


def open_to_append(path: Path, mode: str = "ab", **options: Any) -> IO[Any]:
    """Opens a run's file to append to it, and fails with an `OSError` where something that is no regular file has its name."""
    return open(path, mode, opener=_without_following, **options)


def _without_following(path: str, flags: int) -> int:
    handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{os.path.basename(path)} is not a regular file")
    return handle
