"""Opens a run by its name or path: a new one from a profile, an old one with settings changed, or one that must be there.

What every entrance to a run begins with. Loads no step and no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.runs.folder import _NAME, Run


def open_run(
    name: str | os.PathLike[str] = "demo",
    *,
    profile: str | None = None,
    settings: Iterable[str] | dict[str, Any] = (),
    root: str | os.PathLike[str] | None = None,
) -> Run:
    """Opens a run, making it where it is new.

    Args:
        name: the run's name below `root`, or a path.
        profile: starts a new run from a profile; `$QLORA_PROFILE` or `demo` where none is given.
        settings: changes to the settings, as `["train.max_steps=20"]`.
        root: the folder that holds the runs; `$QLORA_RUNS`, else `runs`.

    Raises:
        ConfigError: unknown or wrong settings; all of them at once.
        RunError: a setting that can't change once training has begun, with the difference; no name for a run, or a relative
            path with a '..' part.
    """
    run = _run_at(name, root)
    old = run.config() if run.exists() else None
    if old is None or (profile is not None and profile != old.profile):
        config = profile_config(profile or os.environ.get("QLORA_PROFILE") or "demo")
    else:
        config = old
    config = config.with_settings(settings)
    if config != old:
        run.change_config(config)
    return run


def new_run(
    name: str | os.PathLike[str] = "demo",
    *,
    profile: str | None = None,
    settings: Iterable[str] | dict[str, Any] = (),
    root: str | os.PathLike[str] | None = None,
) -> Run:
    """Makes a run, or opens the one of that name if it asks for the same.

    Args:
        name, profile, settings, root: as for `open_run`.

    Raises:
        ConfigError: unknown or wrong settings; all of them at once.
        RunError: there is a run of that name with other settings, and the message names them; nothing is changed.
    """
    run = _run_at(name, root)
    settings = settings if isinstance(settings, dict) else list(settings)
    wanted = profile_config(profile or os.environ.get("QLORA_PROFILE") or "demo").with_settings(settings)
    if run.exists() and run.config() != wanted:
        asked, has = _by_name(wanted), _by_name(run.config())
        differing = "; ".join(f"{key}={has[key]!r}, not {asked[key]!r}" for key in has if has[key] != asked[key])
        raise RunError(
            f"there is a run {run.name!r} already, with other settings",
            expected="a new name, or the settings that the run has",
            got=differing,
            next_step="Choose another name, or go on with this run: open_run.",
        )
    if not run.exists():
        run.save_config(wanted)
    return run


def existing_run(name: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Run:
    """Opens a run that must be there.

    Raises:
        RunError: it is not, and the message names the runs that are; or the name or path is none that `open_run` takes.
    """
    run = _run_at(name, root)
    if not run.exists():
        there = ", ".join(found.name for found in find_runs(run.folder.parent)) or "none"
        raise RunError(f"there is no run {run.name!r}", got=f"these runs: {there}", next_step="Train one first.")
    return run


def _by_name(config: RunConfig) -> dict[str, Any]:
    """The settings by their full names, such as `train.max_steps`, and the profile."""
    sections = config.to_dict()
    profile = {"profile": sections.pop("profile")}
    return profile | {
        f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()
    }


def _run_at(name: str | os.PathLike[str], root: str | os.PathLike[str] | None) -> Run:
    path = Path(name)
    if ".." in path.parts and not path.is_absolute():
        raise RunError(
            "that is no name for a run",
            expected="a name below the runs folder, or a path without '..'",
            got=repr(str(name)),
            next_step="Give an absolute path where the run should lie elsewhere.",
        )
    # Path("").name and Path(".").name are empty: below the root they would be the root itself.
    is_path = os.sep in str(name) or not path.name
    return Run(path if is_path else runs_root(root) / name)


def runs_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the runs: the one given, else `$QLORA_RUNS`, else `runs`."""
    return Path(root or os.environ.get("QLORA_RUNS") or "runs")


def find_runs(root: str | os.PathLike[str] = "runs") -> list[Run]:
    """All runs below a folder, by name."""
    return [Run(path.parent) for path in sorted(Path(root).glob("*/config.json")) if _NAME.fullmatch(path.parent.name)]
