"""A sweep's folder, `runs/<name>.sweep/`: which runs it has, and what they may take.

It is a folder beside the runs with `sweep.json` in place of `config.json`; status, requests, log and lock are those of a run. A
sweep's file may come from anywhere, so its names are checked before they are used.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError, UserError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_record
from qlora_helpers.runs.folder import Run, is_run_name

SWEEP = "sweep.json"
SUFFIX = ".sweep"
MOST_SETTINGS, MOST_RUNS = 2, 64


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its name, and the settings in which it differs from the run that the sweep began with."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class SweepFile:
    """What `sweep.json` holds.

    Attributes:
        run: the name of the run whose settings all of them share.
        settings: the values of each setting that is swept.
        members: the runs, in the order in which they are trained.
        budget_hours: what all of them together may take, evaluations included; None for no limit.
    """

    run: str
    settings: dict[str, list[Any]]
    members: tuple[Member, ...]
    budget_hours: float | None = None

    @property
    def is_plausible(self) -> bool:
        """Whether the names can be those of runs, each once."""
        names = [member.name for member in self.members]
        return all(map(is_run_name, [self.run, *names])) and len(set(names)) == len(names) > 0


def read_sweep(sweep: Run) -> SweepFile:
    """Reads a sweep's file.

    Raises:
        RunError: it is missing or damaged.
    """
    path = sweep.folder / SWEEP
    if not path.exists():
        raise RunError(
            f"there is no sweep {sweep.name!r}",
            next_step="Plan one first: ql.sweep(run, {...}), or qlora sweep RUN --set ...",
        )
    return read_record(path, SweepFile, next_step="Delete the sweep's folder and plan it again; its runs are whole.")


def write_sweep(sweep: Run, file: SweepFile) -> None:
    """Writes a sweep's file, whole or not at all."""
    write_json(sweep.folder / SWEEP, file)


def find_sweeps(root: str | os.PathLike[str] = "runs") -> list[Run]:
    """Returns the folders of all sweeps below a folder, in the order of their names."""
    found = [path.parent for path in sorted(Path(root).glob(f"*/{SWEEP}")) if is_run_name(path.parent.name)]
    return [Run(folder) for folder in found if not folder.is_symlink() and not Run(folder).exists()]


def runs_of_sweep(sweep: Run) -> list[Run]:
    """Returns the runs that exist for a sweep alone, so that they go with it.

    The file may name any run. One counts if it has the settings that the file gives it, and if no other sweep has it, too.

    Raises:
        RunError: the sweep's file is missing or damaged.
    """
    root, others = sweep.folder.parent, set()
    for other in find_sweeps(root):
        with contextlib.suppress(RunError):
            others |= {member.name for member in read_sweep(other).members if other.name != sweep.name}
    members = [member for member in read_sweep(sweep).members if member.name not in others]
    return [Run(root / member.name) for member in members if _has_settings(Run(root / member.name), member.settings)]


def _has_settings(run: Run, settings: Mapping[str, Any]) -> bool:
    if run.folder.is_symlink() or not run.exists():
        return False
    try:
        config = run.config()
        return config.with_settings(settings) == config
    except UserError:
        return False


def members_of(run: Run, settings: Mapping[str, Sequence[Any]]) -> tuple[dict[str, list[Any]], tuple[Member, ...]]:
    """Returns the settings' checked values, and a run for each combination of them.

    Args:
        run: whose other settings all runs share.
        settings: the values of up to two settings.

    Raises:
        ConfigError: a setting or a value is wrong; the message lists all of them.
        UserError: there are no settings or too many, or too few or too many values.
    """
    config = run.config()
    if not 1 <= len(settings) <= MOST_SETTINGS:
        raise UserError("a sweep varies one or two settings", got=", ".join(settings) or "none")
    values = {name: _checked(config, name, each) for name, each in settings.items()}
    count = 1
    for each in values.values():
        count *= len(each)
    if not 2 <= count <= MOST_RUNS:
        raise UserError(
            "this is no sweep", expected=f"2 to {MOST_RUNS} runs", got=str(count), next_step="Give other values."
        )
    found = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    return values, tuple(Member(_name(run.name, each), each) for each in found)


def _checked(config: RunConfig, name: str, values: Sequence[Any]) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise UserError(f"{name} needs several values", expected="a list, such as [8, 64]", got=repr(values))
    section, _, key = name.partition(".")
    found = []
    for value in values:
        changed = config.with_settings([f"{name}={value}"] if isinstance(value, str) else {name: value})
        made = getattr(getattr(changed, section), key)
        if isinstance(made, tuple):
            raise UserError(
                f"{name} is a list itself, which can't be swept", next_step="Clone the run by hand instead."
            )
        if made not in found:
            found.append(made)
    return found


def _name(run: str, settings: Mapping[str, Any]) -> str:
    """A run's name, such as `mine-r64-learning_rate0.001`."""
    parts = [run, *(f"{name.partition('.')[2]}{_short(value)}" for name, value in settings.items())]
    return "-".join(parts)[:100]


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in text)[:30]
