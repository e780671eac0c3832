"""Following a run from its folder alone: each look reads what is new and returns everything that a panel shows.

A follower works beside a trainer in another process or on another machine that shares the folder, under torchrun, and after the
trainer has ended. It asks nothing of the trainer, knows no widgets and no model, and imports no torch.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.folders import open_regular
from qlora_helpers.base.text import plain
from qlora_helpers.base.units import duration
from qlora_helpers.runs.events_copy import CopyState, copy_state
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.progress import Progress
from qlora_helpers.runs.requests import Request
from qlora_helpers.runs.status import INTERRUPTED, Status
from qlora_helpers.views.charts import Points
from qlora_helpers.views.log_lines import entries
from qlora_helpers.views.readings import as_number, as_readings, points_of, use_of

CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_gib", "load_percent")
LOG_LINES = 60
LOG_BYTES = 131_072
LINE_CHARACTERS = 400


@dataclass(frozen=True)
class Limit:
    """One limit of the run's budget: its name, the share that is used (0 to 1, or more), and the same in words."""

    name: str
    share: float
    text: str


@dataclass(frozen=True)
class View:
    """A run at one moment.

    Attributes:
        name: the run's name.
        status: what `Run.status` returns.
        curves: `(step, value)` pairs for each of `CURVES`. Memory is that of the fullest GPU and load that of the least busy one;
            without a GPU they are the process's, and load is a percentage of one core.
        records: the logged steps, as `Progress` has them.
        events: what else happened, as `Progress` has it, and `("best", step)` for the lowest evaluation loss.
        generation: the count of `Progress`; if it differs from the last look's, points may have been taken back.
        seconds_left: time left in training, estimated from the pace of this session and shortened by the limits; None if there is
            no estimate.
        left_until: the limit that is expected to end the session before its last step; empty if none is.
        silent_s: seconds since the trainer's last sign of life.
        readings: the latest values of the GPUs, the process and the CPU.
        limits: the limits of the run's budget, if it has one.
        requests: the newest request of each kind in this session, oldest first.
        log: the last lines that the trainer printed, without control characters.
        trouble: why the run failed or died, with the last line it printed; empty if nothing is wrong.
        events_copy: the state of the copy of the TensorBoard events on S3; None if there is no copy.
        settings_changed: whether settings were saved since the last sign of life, so that a finished run may have more to do.
        is_gone: whether the run has no folder.
        on_gpu: whether memory and load are a GPU's.
    """

    name: str
    status: Status
    curves: dict[str, Points]
    records: Sequence[dict[str, Any]] = ()
    events: tuple[tuple[str, int], ...] = ()
    generation: int = 0
    seconds_left: float | None = None
    left_until: str = ""
    silent_s: float = 0.0
    readings: dict[str, Any] = dataclasses.field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    requests: tuple[Request, ...] = ()
    log: tuple[str, ...] = ()
    trouble: str = ""
    events_copy: CopyState | None = None
    settings_changed: bool = False
    is_gone: bool = False
    on_gpu: bool = False

    def last(self, curve: str) -> float | None:
        """Returns the latest value of a curve."""
        points = self.curves[curve]
        return points[-1][1] if points else None


class Follower:
    """Looks at a run repeatedly and reads only what is new.

    Args:
        run: the run to follow; it need not have begun.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._progress = Progress(run.progress_path)
        self._curves: dict[str, list[tuple[int, float]]] = {key: [] for key in CURVES}
        self._generation = 0
        self._on_gpu = False
        self._paced: list[dict[str, Any]] = []  # first and last record of this session
        self._files: dict[Path, tuple[Any, Any]] = {}
        self._looking = threading.Lock()

    def look(self) -> View:
        """Reads the run as it is now.

        Raises:
            RunError: the status is damaged.
        """
        with self._looking:
            status = self.run.status()
            self._read_progress()
            log = self._unless_changed(self.run.log_path, last_lines) or ()
            last = self._progress.records[-1] if self._progress.records else {}
            pace = [record for record in self._paced if record.get("session") == status.session]
            config = self._unless_changed(self.run.config_path, self._train_config)
            left, until = left_within(seconds_left(status, pace), config, status)
            return View(
                self.run.name,
                status,
                {key: tuple(points) for key, points in self._curves.items()},
                tuple(self._progress.records),
                (*self._progress.events, *_best(self._curves["eval_loss"])),
                self._generation,
                left,
                until,
                max(0.0, time.time() - status.heartbeat),
                status.readings or {key: last[key] for key in ("gpus", "process", "processes") if key in last},
                _limits(config, status, last),
                _newest_requests(self.run.requests, status.session),
                log,
                _trouble(status, log),
                events_copy=copy_state(self.run.events_dir),
                settings_changed=self._settings_changed(status),
                is_gone=not self.run.folder.is_dir(),
                on_gpu=self._on_gpu,
            )

    def _read_progress(self) -> None:
        new = self._progress.read()
        if self._progress.generation != self._generation:
            self._generation = self._progress.generation
            self._curves = {key: [] for key in CURVES}
            self._paced, new = [], self._progress.records
        for record in new:
            self._on_gpu = self._on_gpu or bool(as_readings(record)[0])
            values = record | use_of(record)
            for key, points in self._curves.items():
                points.extend(points_of([values], key))
            if not self._paced or self._paced[0].get("session") != record.get("session"):
                self._paced = [record]
            self._paced[1:] = [record]

    def _unless_changed(self, path: Path, read: Any) -> Any:
        """Returns what `read(path)` returned when the file last changed, or None if there is no file."""
        try:
            found = path.stat()
        except OSError:
            return None
        mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        if self._files.get(path, (None, None))[0] != mark:
            self._files[path] = (mark, read(path))
        return self._files[path][1]

    def _settings_changed(self, status: Status) -> bool:
        try:
            return self.run.config_path.stat().st_mtime > status.heartbeat
        except OSError:
            return False

    def _train_config(self, path: Path) -> TrainConfig | None:
        try:
            return self.run.config().train
        except UserError:  # perhaps written by another version; the curves can be shown without it
            return None


def seconds_left(status: Status, records: Sequence[dict[str, Any]]) -> float | None:
    """Estimates the seconds left from the pace between the first and last record of this session; None without a pace."""
    paced = [
        record
        for record in records
        if record.get("session") == status.session and as_number(record.get("time")) is not None
    ]
    steps = paced[-1]["step"] - paced[0]["step"] if paced else 0
    if status.state != "running" or steps <= 0:
        return None
    return (paced[-1]["time"] - paced[0]["time"]) / steps * max(0, status.max_steps - status.step)


def left_within(seconds: float | None, config: TrainConfig | None, status: Status) -> tuple[float | None, str]:
    """Shortens an estimate by the limits of the run's budget, which may end a session before its last step.

    Args:
        seconds: the estimate from the pace alone; None where there is none.
        config: the limits; None where the settings can't be read.
        status: the run's status.

    Returns:
        Seconds left, and the name of the limit that ends the session; empty where its last step does.
    """
    if seconds is None or config is None:
        return seconds, ""
    ends = [(seconds, "")]
    if config.stop_at_minutes is not None:
        ends.append((60 * config.stop_at_minutes - status.session_s, "train.stop_at_minutes"))
    if config.stop_at_usd is not None and status.usd_per_hour:
        left_usd = config.stop_at_usd - (status.used_usd or 0.0)
        ends.append((3600 * left_usd / status.usd_per_hour, "train.stop_at_usd"))
    left, until = min(ends, key=lambda end: end[0])
    return max(0.0, left), until


def _best(points: Sequence[tuple[int, float]]) -> tuple[tuple[str, int], ...]:
    return (("best", min(points, key=lambda point: point[1])[0]),) if points else ()


def last_lines(path: Path, lines: int = LOG_LINES) -> tuple[str, ...]:
    """Returns the last lines of a log as a terminal would show them: a progress bar only in its last state.

    Args:
        path: the log.
        lines: how many; where some of them hold the values of steps, so many of the last other lines are returned, too.
    """
    try:
        with open_regular(path, follow=False) as file:
            file.seek(0, 2)
            start = max(0, file.tell() - LOG_BYTES)
            file.seek(start)
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ()
    found = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    if start and len(found) > 1:
        del found[0]  # the read began in the middle of this line
    shown = [plain(line).rstrip() for line in found]
    cut = [line if len(line) <= LINE_CHARACTERS else line[: LINE_CHARACTERS - 1] + "…" for line in shown if line]
    messages = [place for place, entry in enumerate(entries(cut)) if not entry.is_step][-lines:]
    kept = sorted({*messages, *range(max(0, len(cut) - lines), len(cut))})
    return tuple(cut[place] for place in kept)


def _limits(config: TrainConfig | None, status: Status, last: dict[str, Any]) -> tuple[Limit, ...]:
    if config is None:
        return ()
    found = []
    if config.stop_at_usd is not None:
        used = status.used_usd or 0.0
        found.append(Limit("dollars", used / config.stop_at_usd, f"{used:.2f} of {config.stop_at_usd:g} USD"))
    if config.stop_at_minutes is not None:
        most = 60 * config.stop_at_minutes
        found.append(Limit("time", status.session_s / most, f"{duration(status.session_s)} of {duration(most)}"))
    if config.patience is not None:
        counted = last.get("evaluations_without_better") if last.get("session") == status.session else 0
        without = int(as_number(counted) or 0)
        text = f"{without} of {config.patience} evaluations without a better loss"
        found.append(Limit("patience", without / config.patience, text))
    return tuple(found)


def _newest_requests(requests: Iterable[Request], session: int) -> tuple[Request, ...]:
    newest = {request.kind: request for request in requests if request.session == session}
    return tuple(sorted(newest.values(), key=lambda request: request.id))


def _trouble(status: Status, log: Sequence[str]) -> str:
    if status.state not in ("failed", "dead"):
        return "" if status.is_live else plain(status.warning)
    if status.exit_reason == INTERRUPTED:
        return "It was interrupted. Resume continues from the last good checkpoint"
    parts = [status.last_error or status.exit_reason or "it ended"]
    if status.state == "dead" and log and log[-1].startswith("error: "):  # the command line refused it before it began
        return plain(log[-1].removeprefix("error: "))
    if status.state == "dead":
        parts = ["The trainer's process ended without an error message; it may have been killed because memory ran out"]
        last = [entry.text for entry in entries(log) if not entry.is_step][-1:]
        parts += [f"The last line of its log: {text}" for text in last]
    return plain(". ".join(parts))
