"""Evaluates a run in a process of its own, which a closed browser or a restarted kernel does not stop.

Knows nothing of what the command does; how far it has come is in the run's folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.folders import open_regular
from qlora_helpers.base.python import python_command
from qlora_helpers.base.records import read_record
from qlora_helpers.runs.detached import collect_ended, start_detached
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import refuse_links
from qlora_helpers.runs.locks import is_being_evaluated
from qlora_helpers.runs.status import Status, is_alive


@dataclass(frozen=True)
class StartedEvaluation:
    """A run that is evaluated in a process of its own."""

    run: Run
    pid: int

    def __repr__(self) -> str:
        return f"{self.run.name} is evaluated in process {self.pid}; its log: {self.run.name}/{log_path(self.run).name}"

    def is_alive(self) -> bool:
        """Whether the process is still there."""
        return is_launched(self.run)


@dataclass(frozen=True)
class Process:
    """A process that was started to evaluate a run: `evaluation_process.json`."""

    pid: int
    host: str
    started: float


def process_path(run: Run) -> Path:
    """Returns the path of what is known of the last background evaluation's process."""
    return run.folder / "evaluation_process.json"


def is_launched(run: Run) -> bool:
    """Whether the process of the last background evaluation lives on this machine; it may still be starting."""
    collect_ended()
    with contextlib.suppress(RunError):
        found = read_record(process_path(run), Process)
        return is_alive(Status(pid=found.pid, host=found.host, heartbeat=found.started))
    return False


def log_path(run: Run) -> Path:
    """Returns the path of what a background evaluation prints."""
    return run.folder / "evaluation_log.txt"


def launch_evaluation(run: Run, *, rivals: Sequence[Run] = (), again: bool = False) -> StartedEvaluation:
    """Starts `python -m qlora_helpers evaluate RUN` and returns at once; it prints into the run's `evaluation_log.txt`.

    Args:
        run: a run with a saved adapter.
        rivals: further runs on the same base model.
        again: whether to ask everything anew.

    Raises:
        RunError: the run is being evaluated already, or the process could not be started.
    """
    refuse_links(run.folder)
    if is_being_evaluated(run) or is_launched(run):
        raise RunError(
            f"{run.name!r} is being evaluated already", next_step="ql.evaluation_panel(run) shows how far it is."
        )
    command = python_command("qlora_helpers", "evaluate", str(run.folder.resolve()))
    for rival in rivals:
        command += ["--rival", str(rival.folder.resolve())]
    command += ["--again"] if again else []
    pid = start_detached(command, log_path(run))
    write_json(process_path(run), Process(pid, socket.gethostname(), time.time()))
    return StartedEvaluation(run, pid)


def stop_evaluation(run: Run, pid: int) -> None:
    """Interrupts the process that evaluates a run on this machine; what was answered is kept, and the next one goes on there.

    Args:
        run: the run.
        pid: of the process that evaluates it; 0 where it is still starting.
    """
    if not pid and is_launched(run):
        pid = read_record(process_path(run), Process).pid
    if pid > 0 and (is_being_evaluated(run) or is_launched(run)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)


def last_line(run: Run) -> str:
    """Returns the last line that a background evaluation printed; empty where there is none."""
    with contextlib.suppress(OSError), open_regular(log_path(run), follow=False) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
    return ""
