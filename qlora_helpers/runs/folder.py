"""One run, one folder: its paths, settings, status, requests and progress.

What notebooks, panels, background processes and cluster jobs share about a run passes through this folder and nothing else.
This module knows no model and imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig, config_from_dict
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import not_written, read_json, write_json
from qlora_helpers.runs.progress import Progress
from qlora_helpers.runs.requests import REQUEST_KINDS, Request, Requests
from qlora_helpers.runs.status import STATES, WENT_SILENT, Status, is_alive

FIXED = ("model", "adapter", "data")  # sections that can't change once a run has trained
# The trainer's heart beats in a thread of its own; what the two write into one file must not cross.
_WRITING = threading.RLock()
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Run:
    """A run folder, `runs/<name>/`. Cheap to make; holds nothing but the path.

    Args:
        folder: the run's folder; need not exist yet. One with a '..' part is kept as an absolute path, which opens the same run
            wherever it is handed on to.

    Raises:
        RunError: the last part of the path is not a plain name.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not _NAME.fullmatch(self.folder.name):
            raise RunError(
                "that is no name for a run",
                expected="letters, digits, '.', '_' and '-', starting with a letter or digit, 100 at most",
                got=repr(self.folder.name),
                next_step="Choose another name.",
            )
        if ".." in self.folder.parts:  # a run's folder itself may be a link, and stays one
            self.folder = self.folder.parent.resolve() / self.folder.name

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.status().state})"

    @property
    def name(self) -> str:
        return self.folder.name

    config_path = property(lambda self: self.folder / "config.json")
    plan_path = property(lambda self: self.folder / "plan.json")
    data_dir = property(lambda self: self.folder / "data")
    checkpoints_dir = property(lambda self: self.folder / "checkpoints")
    status_path = property(lambda self: self.folder / "status.json")
    progress_path = property(lambda self: self.folder / "progress.jsonl")
    requests_dir = property(lambda self: self.folder / "requests")
    events_dir = property(lambda self: self.folder / "events")
    log_path = property(lambda self: self.folder / "log.txt")
    adapter_dir = property(lambda self: self.folder / "adapter")
    evaluation_path = property(lambda self: self.folder / "evaluation.json")
    report_path = property(lambda self: self.folder / "report.html")

    def exists(self) -> bool:
        """Whether the run has a configuration."""
        return self.config_path.exists()

    def config(self) -> RunConfig:
        """What was asked.

        Raises:
            RunError: the run has none yet, or the file is damaged.
            ConfigError: the file holds unknown or wrong settings.
        """
        if not self.exists():
            raise RunError(
                f"the run {self.name!r} does not exist yet",
                next_step="Run notebook 00_setup, or `python -m qlora_helpers train "
                f"{self.name} --profile demo`, which makes it.",
            )
        return config_from_dict(read_json(self.config_path))

    def save_config(self, config: RunConfig) -> None:
        """Writes `config.json`."""
        write_json(self.config_path, config.to_dict())

    def change_config(self, config: RunConfig) -> None:
        """Writes `config.json` unless it changes what a trained adapter stands on.

        Raises:
            RunError: the run has trained, and a setting of model, adapter or data differs; nothing is written.
        """
        if self.exists() and self.has_trained():
            self._refuse_fixed_changes(self.config(), config)
        self.save_config(config)

    def has_trained(self) -> bool:
        """Whether there is a checkpoint or an adapter, so that model, adapter and data can't change any more."""
        return any(self.checkpoints_dir.glob("checkpoint-*")) or self.adapter_dir.exists()

    def _refuse_fixed_changes(self, old: RunConfig, new: RunConfig) -> None:
        self.refuse_differences(old.to_dict(), new.to_dict())

    def refuse_differences(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Compares what a trained run stands on; settings and marks (digests by what they are of) that only one has don't count.

        Raises:
            RunError: something differs.
        """
        changed = [
            f"{section}.{key}: {value!r} -> {after[section][key]!r}"
            for section in FIXED
            for key, value in before.get(section, {}).items()
            if key in after[section] and value != after[section][key]
        ]
        marks, now = before.get("marks", {}), after.get("marks", {})
        changed += [f"{name} is not what it was" for name in marks if name in now and now[name] != marks[name]]
        if changed:
            raise RunError(
                f"the run {self.name!r} has trained already, and these can't change now: " + "; ".join(changed),
                next_step="Give the new settings a run of their own (another name), or delete this one.",
            )

    def need(self, path: Path, made_by: str) -> Path:
        """Returns `path` if it is there.

        Raises:
            RunError: it is not; the message says `made_by` makes it.
        """
        if not path.exists():
            raise RunError(
                f"{self.name}/{path.name} is not there yet", next_step=f"{made_by} makes it; run that first."
            )
        return path

    # status

    def status(self) -> Status:
        """The run's status; a trainer that no longer lives is told as `dead`."""
        if not self.status_path.exists():
            return Status()
        known = {item.name for item in dataclasses.fields(Status)}
        values = read_json(self.status_path)
        if not isinstance(values, dict):
            raise RunError(f"{self.status_path} is damaged", next_step="Delete it; the run goes on without.")
        status = Status(**{key: value for key, value in values.items() if key in known})
        if not status.is_plausible:
            raise RunError(f"{self.status_path} is damaged", next_step="Delete it; the run goes on without.")
        if status.is_live and not is_alive(status):
            return dataclasses.replace(status, state="dead", exit_reason=WENT_SILENT)
        return status

    def set_status(self, **changes: Any) -> Status:
        """Changes some fields of `status.json` and beats the heart."""
        with _WRITING:
            status = self.status()
            if status.state == "dead":
                status = dataclasses.replace(status, state="running", exit_reason=None)
            return self._write_status(dataclasses.replace(status, **changes))

    def _write_status(self, status: Status) -> Status:
        if status.state not in STATES:
            raise ValueError(f"state {status.state!r} is none of {STATES}")
        status = dataclasses.replace(status, heartbeat=time.time())
        write_json(self.status_path, status)
        return status

    def open_session(self, *, usd_per_hour: float | None = None) -> Status:
        """Begins a session: status `starting`, in this process. One that was opened for this trainer already is taken over.

        Args:
            usd_per_hour: what the machine costs, where that is known.
        """
        with _WRITING:
            status = self.status()
            opened = status if status.state == "starting" else status.next_session()
            price = opened.usd_per_hour if usd_per_hour is None else usd_per_hour
            return self._write_status(
                dataclasses.replace(opened, pid=os.getpid(), host=socket.gethostname(), usd_per_hour=price)
            )

    def start_session(self, max_steps: int, resumed_from: int) -> int:
        """The trainer takes its first step: status `running`, and a line in `progress.jsonl` that supersedes later steps.

        Args:
            max_steps: optimizer steps of the whole run.
            resumed_from: the step of the checkpoint it goes on from; 0 for a fresh start.

        Returns:
            The session's number, from 1.
        """
        session = self.open_session().session
        self.append_progress({"event": "start", "session": session, "resumed_from": resumed_from})
        self.set_status(state="running", step=resumed_from, max_steps=max_steps)
        return session

    # progress

    def append_progress(self, record: dict[str, Any]) -> None:
        """Appends one line to `progress.jsonl`; a line that a killed process left half written is closed first.

        Raises:
            RunError: the disk is full or the folder can't be written.
        """
        line = json.dumps({"time": round(time.time(), 3)} | record, allow_nan=False) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.progress_path, "ab+") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        line = "\n" + line
                file.write(line.encode())
        except OSError as error:
            raise not_written(self.progress_path, error) from error

    def progress(self) -> list[dict[str, Any]]:
        """The logged steps as one gapless curve: what a resumed session did again is dropped, half-written lines too."""
        progress = Progress(self.progress_path)
        progress.read(to_end=True)
        return progress.records

    # requests

    def request(self, kind: str) -> Request:
        """Asks the running trainer to `stop` (save, then end) or to `save` now.

        Raises:
            RunError: the kind is unknown, or nothing is running.
        """
        if kind not in REQUEST_KINDS:
            raise RunError("unknown request", expected=" or ".join(REQUEST_KINDS), got=repr(kind))
        status = self.status()
        if not status.is_live:
            raise RunError(f"the run {self.name!r} is {status.state}", next_step="Only a running trainer can be asked.")
        return self.requests.add(kind, status.session)

    @property
    def requests(self) -> Requests:
        """What was asked of this run's trainers."""
        return Requests(self.requests_dir)


def add_to_plan(run: Run, **found: Any) -> None:
    """Writes what was found into the run's `plan.json`, beside what is there."""
    old = read_json(run.plan_path) if run.plan_path.exists() else {}
    write_json(run.plan_path, old | found)
