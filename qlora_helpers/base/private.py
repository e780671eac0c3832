"""Folders that no other user of the machine may enter, beside what Jupyter keeps while it runs: for sockets and tokens."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def private_folder(name: str) -> Path:
    """Returns a folder of this account that only its owner may enter; makes it if it does not exist.

    Raises:
        PermissionError: the folder belongs to somebody else, or is a link.
    """
    from jupyter_core.paths import jupyter_runtime_dir

    folder = Path(jupyter_runtime_dir()) / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} is not a folder of this account")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder
