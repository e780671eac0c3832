"""Starts processes that a closed browser, a restarted kernel or an interrupted cell does not stop.

Knows nothing of what they do.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.python import python_environment
from qlora_helpers.runs.guard import open_to_append

_children: list[subprocess.Popen[bytes]] = []  # kept so that `collect` can ask each whether it has ended


def start_detached(command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Starts a command in a session of its own, with its output appended to a file, and returns its id at once.

    Args:
        command: the command and its arguments.
        log: the file that it prints into.
        environment: its variables; None takes those of a Python process that has this package.

    Raises:
        RunError: it could not be started, or the file can't be written.
    """
    variables = dict(environment or python_environment()) | {"PYTHONUNBUFFERED": "1"}
    variables.pop("MPLBACKEND", None)  # the kernel's
    try:
        with open_to_append(log) as output:
            process = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise RunError(f"the process could not be started ({error})", next_step="Free some space or memory.") from error
    collect()
    _children.append(process)
    return process.pid


def collect() -> None:
    """Lets the system forget those of the processes that have ended; until then they still count as alive."""
    for child in list(_children):
        if child.poll() is not None:
            _children.remove(child)
