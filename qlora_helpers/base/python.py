"""Starts Python in a process of its own, which imports nothing from the folder that it runs in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import qlora_helpers

_INSTALLED = ("site-packages", "dist-packages")


def python_command(module: str, *arguments: str) -> list[str]:
    """Returns the command `python -P -m module arguments`: with `-P` a file in the working folder can't pose as a module."""
    return [sys.executable, "-P", "-m", module, *arguments]


def python_environment() -> dict[str, str]:
    """Returns this process's environment, in which such a process finds this package also where it is not installed."""
    root = str(Path(qlora_helpers.__file__).resolve().parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if root in paths or Path(root).name in _INSTALLED:
        return dict(os.environ)
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join([root, *paths])}
