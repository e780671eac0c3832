"""One run, one folder: its paths, settings, status, requests and progress.

What notebooks, panels, background processes and cluster jobs share about a run passes through this folder and nothing else.
This module knows no model and imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

from qlora_helpers.base.addresses import redacted
from qlora_helpers.base.config import RunConfig, config_from_dict, value_today
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import content_digest, not_written, read_json, write_json
from qlora_helpers.base.records import read_object, read_record
from qlora_helpers.runs import buckets
from qlora_helpers.runs.guard import open_to_append
from qlora_helpers.runs.progress import Progress
from qlora_helpers.runs.requests import REQUEST_KINDS, Request, Requests
from qlora_helpers.runs.status import STATES, WENT_SILENT, Status, is_alive

FIXED = ("model", "adapter", "data")  # sections that can't change once a run has trained
# The heartbeat's thread and the trainer change the same status file: one must not overwrite what the other has just written.
_WRITING = threading.RLock()
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_run_name(name: str) -> bool:
    """Whether a name can be that of a run: plain enough for a folder, an S3 key and a command line."""
    return _NAME.fullmatch(name) is not None


class Run:
    """A run folder, `runs/<name>/`. The object holds nothing but the path, so it is cheap to create.

    Args:
        folder: the run's folder, which need not exist yet. A path with a '..' part is made absolute, so that it still leads to
            the same run in a process with another working directory.

    Raises:
        RunError: the last part of the path is not a plain name.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not is_run_name(self.folder.name):
            raise RunError(
                "this can't be the name of a run",
                expected="letters, digits, '.', '_' and '-', starting with a letter or digit, 100 at most",
                got=repr(self.folder.name),
                next_step="Choose another name.",
            )
        if ".." in self.folder.parts:  # only the parent is resolved: the run's folder may itself be a link
            self.folder = self.folder.parent.resolve() / self.folder.name

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.status().state})"

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
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
        """Reads the run's settings.

        Raises:
            RunError: the run has no settings yet, or the file is damaged.
            ConfigError: the file holds unknown or wrong settings.
        """
        if not self.exists():
            raise RunError(
                f"the run {self.name!r} does not exist yet",
                next_step="Run notebook 00_setup, or `python -m qlora_helpers train "
                f"{self.name} --profile demo`, to create it.",
            )
        return config_from_dict(read_json(self.config_path))

    def save_config(self, config: RunConfig) -> None:
        """Writes `config.json`. A bucket that it did not name before is confirmed: a person has set it here."""
        if buckets.bucket_of(config) not in (None, self._bucket_on_disk()):
            buckets.confirm(config)
        write_json(self.config_path, config.to_dict())

    def _bucket_on_disk(self) -> str | None:
        with contextlib.suppress(UserError):
            return buckets.bucket_of(self.config())
        return None

    def change_config(self, config: RunConfig) -> None:
        """Writes `config.json`, unless the run has trained and a setting that its adapter depends on would change.

        Raises:
            RunError: the run has trained, and a setting of model, adapter or data differs; nothing is written.
        """
        if self.exists() and self.has_trained():
            self.refuse_differences(self.config().to_dict(), config.to_dict())
        self.save_config(config)

    def has_trained(self) -> bool:
        """Whether there is a checkpoint or an adapter, so that the settings of model, adapter and data are fixed."""
        return any(self.checkpoints_dir.glob("checkpoint-*")) or self.adapter_dir.exists()

    def refuse_differences(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Compares two sets of settings that a trained run depends on; what only one of them has is not compared.

        Args:
            before: the sections of `FIXED`, and under `marks` digests of what settings only name, such as the data file.
            after: the same, as it is now.

        Raises:
            RunError: something differs; the message lists all of it.
        """
        changed = [
            f"{section}.{key}: {value!r} -> {after[section][key]!r}"
            for section in FIXED
            for key, value in before.get(section, {}).items()
            if key in after[section] and value_today(f"{section}.{key}", value) != after[section][key]
            if (section, key) != ("data", "source") or not self._is_same_data(before, after[section][key])
        ]
        marks, now = before.get("marks", {}), after.get("marks", {})
        changed += [f"{name} has changed" for name in marks if name in now and now[name] != marks[name]]
        if changed:
            raise RunError(
                f"the run {self.name!r} has trained already, and these can't change now: " + "; ".join(changed),
                next_step="Start a new run under another name, or delete this one.",
            )

    def _is_same_data(self, before: dict[str, Any], source: str) -> bool:
        """Whether files hold what the run was trained on, under another path."""
        content = content_digest(source)
        marks = [before.get("marks", {})]
        for path in [*self.checkpoints_dir.glob("checkpoint-*/trained_on.json"), self.data_dir / "prepared.json"]:
            with contextlib.suppress(RunError):
                found = read_object(path)
                marks += [found.get("marks"), {"the content of the data": found.get("content")}]
        named = [item for each in marks if isinstance(each, dict) for item in each.items()]
        known = {mark for name, mark in named if name.startswith("the content of ")}
        return content is not None and content in known

    def need(self, path: Path, made_by: str) -> Path:
        """Returns `path` if it exists.

        Args:
            path: a file or folder of the run.
            made_by: the notebook or command that makes it.

        Raises:
            RunError: it does not exist; the message names what makes it.
        """
        if not path.exists():
            raise RunError(
                f"{self.name}/{path.name} is not there yet", next_step=f"{made_by} makes it; run that first."
            )
        return path

    # status

    def status(self) -> Status:
        """Reads the run's status. Its state is `dead` where a trainer should be running and its process no longer exists.

        Raises:
            RunError: the file is damaged.
        """
        if not self.status_path.exists():
            return Status()
        status = read_record(self.status_path, Status, next_step="Delete it; the run can go on without it.")
        if status.is_live and not is_alive(status):
            return dataclasses.replace(status, state="dead", exit_reason=WENT_SILENT)
        return status

    def set_status(self, **changes: Any) -> Status:
        """Changes some fields of `status.json` and sets its heartbeat to now."""
        with _WRITING:
            status = self.status()
            if status.state == "dead":
                status = dataclasses.replace(status, state="running", exit_reason=None)
            return self._write_status(dataclasses.replace(status, **changes))

    def _write_status(self, status: Status) -> Status:
        if status.state not in STATES:
            raise ValueError(f"expected a state out of {', '.join(STATES)}, got {status.state!r}")
        error = status.last_error and redacted(status.last_error)
        status = dataclasses.replace(status, heartbeat=time.time(), last_error=error)
        write_json(self.status_path, status)
        return status

    def open_session(self, *, usd_per_hour: float | None = None) -> Status:
        """Opens a session in this process, with the state `starting`, or takes over one that was opened for this process.

        Args:
            usd_per_hour: the machine's price; None where it is unknown.
        """
        with _WRITING:
            status = self.status()
            opened = status if status.state == "starting" else status.next_session()
            price = opened.usd_per_hour if usd_per_hour is None else usd_per_hour
            return self._write_status(
                dataclasses.replace(opened, pid=os.getpid(), host=socket.gethostname(), usd_per_hour=price)
            )

    def start_session(self, max_steps: int, resumed_from: int) -> int:
        """Sets the state `running`, and appends a line to `progress.jsonl` that supersedes the steps after `resumed_from`.

        Args:
            max_steps: optimizer steps of the whole run.
            resumed_from: the step of the checkpoint that training goes on from; 0 for a fresh start.

        Returns:
            The session's number, from 1.
        """
        session = self.open_session().session
        self.append_progress({"event": "start", "session": session, "resumed_from": resumed_from})
        self.set_status(state="running", phase="training", step=resumed_from, max_steps=max_steps)
        return session

    # progress

    def append_progress(self, record: dict[str, Any]) -> None:
        """Appends one line to `progress.jsonl`, after ending a line that a killed process left half written.

        Raises:
            RunError: the disk is full or the folder can't be written.
        """
        line = json.dumps({"time": round(time.time(), 3)} | record, allow_nan=False) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open_to_append(self.progress_path, "ab+") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        line = "\n" + line
                file.write(line.encode())
        except OSError as error:
            raise not_written(self.progress_path, error) from error

    def progress(self) -> list[dict[str, Any]]:
        """Returns the logged steps as one curve without gaps; steps that a later session repeated and damaged lines are dropped."""
        progress = Progress(self.progress_path)
        progress.read(to_end=True)
        return progress.records

    # requests

    def request(self, kind: str) -> Request:
        """Asks the running trainer to `stop` (save, then end) or to `save` now.

        Raises:
            RunError: the kind is unknown, or no trainer is running.
        """
        if kind not in REQUEST_KINDS:
            raise RunError("unknown request", expected=" or ".join(REQUEST_KINDS), got=repr(kind))
        status = self.status()
        if not status.is_live:
            raise RunError(
                f"the run {self.name!r} is {status.state}", next_step="Only a running trainer takes requests."
            )
        return self.requests.add(kind, status.session)

    @property
    def requests(self) -> Requests:
        """The requests to this run's trainers."""
        return Requests(self.requests_dir)
