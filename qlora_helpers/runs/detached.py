"""Starts commands in processes of their own, which a closed browser or a restarted kernel does not stop.

Knows nothing of what a command does.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.python import python_environment
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import open_to_append

_children: list[subprocess.Popen[bytes]] = []  # kept so that `collect_ended` can collect them


def start_detached(command: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None) -> int:
    """Starts a command that prints into a file, and returns its process's number at once.

    Args:
        command: the command.
        log_path: the file; what it holds stays.
        environment: the process's variables; None takes those of `python_environment`.

    Raises:
        RunError: the process could not be started.
    """
    environment = {**(python_environment() if environment is None else environment), "PYTHONUNBUFFERED": "1"}
    environment.pop("MPLBACKEND", None)  # the kernel's
    collect_ended()
    try:
        with open_to_append(log_path) as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise RunError(f"the process could not be started ({error})", next_step="Free some space or memory.") from error
    _children.append(process)
    return process.pid


def start_session(run: Run, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Opens a run's session, starts a command for it that prints into its log, and returns the process's number at once.

    Raises:
        RunError: as for `start_detached`; the run's status says so, too.
    """
    run.open_session()
    try:
        pid = start_detached(command, run.log_path, environment)
    except RunError as error:
        run.set_status(state="failed", exit_reason="it could not be started", last_error=str(error.__cause__ or error))
        raise
    if run.status().state == "starting":
        run.set_status(pid=pid)
    return pid


def collect_ended() -> None:
    """Collects the processes that have ended; until then the system lists them as if they were alive."""
    for child in list(_children):
        if child.poll() is not None:
            with contextlib.suppress(ValueError):  # another thread did
                _children.remove(child)
