"""Trains and evaluates the runs of a sweep one after another, under one budget, in a process of its own.

Each run trains as `launch.start` trains it: a sweep's process that is killed leaves its run training to its end, and a resumed
sweep waits for it.
A sweep is stopped by a request in its folder, as a run is. This module knows no model and imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.python import python_command, python_environment
from qlora_helpers.base.text import Say
from qlora_helpers.base.units import duration
from qlora_helpers.runs import launch, locks
from qlora_helpers.runs.buckets import refuse_unconfirmed
from qlora_helpers.runs.detached import start_session
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.guard import open_to_append, refuse_links
from qlora_helpers.runs.heartbeat import sending_heartbeats
from qlora_helpers.runs.opening import refuse_other_settings
from qlora_helpers.runs.status import BY_BUDGET, BY_REQUEST
from qlora_helpers.runs.sweep_file import SUFFIX, Member, SweepFile, read_sweep, write_sweep

LOOK_EVERY_S = 1.0
log = logging.getLogger(__name__)


def make_sweep(run: Run, file: SweepFile) -> Run:
    """Writes a sweep's folder and those of its runs; a sweep and runs with the same settings are used as they are.

    Raises:
        RunError: a run of one of the names has other settings, or the settings name a bucket that nobody has named on this machine;
            nothing is written.
    """
    config = run.config()
    refuse_unconfirmed(config)
    runs = {member.name: Run(run.folder.parent / member.name) for member in file.members}
    wanted = {member.name: config.with_settings(member.settings) for member in file.members}
    for name, each in runs.items():
        refuse_other_settings(each, wanted[name])
    sweep = folder_for(run, file)
    write_sweep(sweep, file)
    for name, each in runs.items():
        if not each.exists():
            each.save_config(wanted[name])
    return sweep


def folder_for(run: Run, file: SweepFile) -> Run:
    """Returns the folder of a sweep: one with the same runs, else the first free name."""
    for number in range(1, 1000):
        sweep = Run(run.folder.parent / f"{run.name[:80]}{f'-{number}' if number > 1 else ''}{SUFFIX}")
        if not sweep.folder.exists():
            return sweep
        with contextlib.suppress(RunError):
            if read_sweep(sweep).members == file.members:
                return sweep
    raise RunError(f"there are too many sweeps of {run.name!r}", next_step="Delete some.")


def start_sweep(sweep: Run) -> int:
    """Starts or resumes a sweep in a process that depends on no notebook and no terminal, and returns its id at once.

    Raises:
        RunError: it is running already, or its budget is used up.
    """
    refuse_links(sweep.folder)
    file, status = read_sweep(sweep), sweep.status()
    if status.is_live or locks.is_locked(sweep):
        raise RunError(f"the sweep {sweep.name!r} is running already", next_step="Look at it, or stop it first.")
    _refuse_spent(sweep, file)
    command = python_command("qlora_helpers", "sweep", str(sweep.folder.resolve()), "--foreground")
    return start_session(sweep, command)


def _refuse_spent(sweep: Run, file: SweepFile) -> None:
    used = sweep.status().used_s
    if file.budget_hours is not None and used >= 3600 * file.budget_hours:
        raise RunError(
            f"the sweep has used {duration(used)} of its {file.budget_hours:g} hours", next_step="Plan it with more."
        )


def run_sweep(sweep: Run, *, say: Say = print, train: Callable[[Run], Any] = launch.start) -> str:
    """Trains and evaluates a sweep's runs one after another, and returns when all are done, or it was stopped.

    Args:
        sweep: its folder.
        say: called with a line on each run.
        train: starts a run in a process of its own, as `launch.start` does.

    Returns:
        Why it ended, in a sentence.

    Raises:
        RunError: it is running already, or its budget is used up.
    """
    refuse_links(sweep.folder)
    file = read_sweep(sweep)
    with locks.run_lock(sweep):
        _refuse_spent(sweep, file)
        session = sweep.open_session().session
        with sending_heartbeats(sweep, session):
            try:
                state, reason = _Driver(sweep, file, session, say, train).drive()
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
                with contextlib.suppress(RunError):
                    sweep.set_status(state="failed", exit_reason="an error", last_error=text[:2000])
                raise
            failed = state == "failed"
        sweep.set_status(state=state, exit_reason=reason, last_error=reason if failed else None)
        sweep.requests.acknowledge_all("the sweep has ended")
    say(reason)
    return reason


class _Driver:
    """One session of a sweep."""

    def __init__(self, sweep: Run, file: SweepFile, session: int, say: Say, train: Callable[[Run], Any]) -> None:
        self.sweep, self.file, self.session, self.say, self.train = sweep, file, session, say, train
        self.began = time.monotonic()
        self.spent_s = sweep.status().spent_s

    def drive(self) -> tuple[str, str]:
        """Goes through the runs; returns the sweep's state at the end, and why it ended."""
        members, failed = self.file.members, []
        for number, member in enumerate(members):
            self.sweep.set_status(state="running", step=number, max_steps=len(members))
            if reason := self._why_end():
                return "stopped", reason
            run = Run(self.sweep.folder.parent / member.name)
            try:
                refuse_links(run.folder)
                self._train(run, member, f"{number + 1} of {len(members)}")
                if (reason := self._why_end()) and not is_trained(run):
                    return "stopped", reason
                if not is_trained(run):
                    raise RunError(_why_failed(run))
                if reason := self._evaluate(run):
                    return "stopped", reason
            except UserError as error:  # of this run alone
                failed.append(member.name)
                self.say(f"{member.name} failed: {error}")
        done = len(members) - len(failed)
        self.sweep.set_status(step=done)
        if failed:
            return (
                "failed" if not done else "finished"
            ), f"{done} of {len(members)} runs are done; failed: {', '.join(failed)}"
        return "finished", f"all {len(members)} runs are done"

    def _why_end(self) -> str:
        """Why the sweep should end now; empty if it need not."""
        if any(request.kind == "stop" for request in self.sweep.requests.pending(self.session)):
            return BY_REQUEST
        used = self.spent_s + time.monotonic() - self.began
        if self.file.budget_hours is not None and used >= 3600 * self.file.budget_hours:
            return f"{BY_BUDGET}{duration(used)} of {self.file.budget_hours:g} hours are over"
        return ""

    def _train(self, run: Run, member: Member, place: str) -> None:
        """Trains a run unless it has, or waits for the process that trains it, and forwards a request to stop."""
        if is_trained(run):
            return
        values = ", ".join(f"{name}={value}" for name, value in member.settings.items())
        self.say(f"run {place}: {run.name} ({values})")
        if not run.status().is_live:
            self.train(run)
        asked = False
        while run.status().is_live:
            if self._why_end() and not asked:
                with contextlib.suppress(RunError):  # it may have ended just now
                    run.request("stop")
                    asked = True
            time.sleep(LOOK_EVERY_S)

    def _evaluate(self, run: Run) -> str:
        """Evaluates a run unless it was since it trained; returns why the sweep must end meanwhile, if it must."""
        if is_evaluated(run):
            return ""
        self.say(f"evaluating {run.name}")
        command = python_command("qlora_helpers", "evaluate", str(run.folder.resolve()))
        with open_to_append(run.log_path) as output:
            process = subprocess.Popen(
                command, env=python_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None:
                    if reason := self._why_end():
                        return reason
                    time.sleep(LOOK_EVERY_S)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if process.returncode:
            raise RunError(f"its evaluation ended with exit code {process.returncode}; see {_last_line(run.log_path)}")
        return ""


def is_trained(run: Run) -> bool:
    """Whether a run has done all its steps, or ended because its loss no longer fell."""
    status = run.status()
    patience = status.state == "stopped" and (status.exit_reason or "").endswith("(train.patience)")
    return run.adapter_dir.exists() and (status.state == "finished" or patience)


def is_evaluated(run: Run) -> bool:
    """Whether a run has an evaluation that is no older than its adapter."""
    try:
        weights = (run.adapter_dir / "adapter_model.safetensors").stat().st_mtime
        return run.evaluation_path.stat().st_mtime >= weights
    except OSError:
        return False


def _why_failed(run: Run) -> str:
    status = run.status()
    return status.last_error or status.exit_reason or f"it is {status.state}"


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][:200] if lines else path.name
