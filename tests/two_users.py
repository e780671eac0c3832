"""Processes of another user of this machine, for tests of what other users can reach; only root can start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can start another user's process"
)


def as_other_user(code: str, *arguments: str, uid: int = NOBODY) -> subprocess.CompletedProcess[str]:
    """Runs Python code as another user, without this environment, and with the standard library alone.

    Where that user may not read this Python, what the code imports must be among what is imported here beforehand.
    """
    drop = "import encodings.idna, fcntl, http.client, os, socket, sys, time, traceback, urllib.request\n"
    drop += f"os.setgroups([]); os.setgid({uid}); os.setuid({uid}); os.chdir('/')\n"
    return subprocess.run(
        [os.path.realpath(sys.executable), "-I", "-S", "-c", drop + code, *arguments],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )


def open_way_to(folder: Path) -> None:
    """Lets everybody look into a folder and all that it lies in below the temporary folder; pytest's own are private."""
    for each in (folder, *folder.parents):
        if each.stat().st_mode & 0o1000:  # /tmp itself
            return
        if each.stat().st_uid == os.geteuid():
            each.chmod(each.stat().st_mode | 0o055)
