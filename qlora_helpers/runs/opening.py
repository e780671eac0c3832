"""Opens a run by its name or path: creates it from a profile, changes its settings, or insists that it exists.

Every way into a run begins here. This module loads no step and no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.runs import buckets
from qlora_helpers.runs.folder import Run, is_run_name
from qlora_helpers.runs.guard import refuse_links

MOST_NAMED = 8  # settings in a message


def open_run(
    name: str | os.PathLike[str] = "demo",
    *,
    profile: str | None = None,
    settings: Iterable[str] | dict[str, Any] = (),
    root: str | os.PathLike[str] | None = None,
) -> Run:
    """Opens a run and creates it if it is new.

    Args:
        name: the run's name below `root`, or a path.
        profile: the profile that a new run starts from; None takes `$QLORA_PROFILE`, else `demo`. An existing run of another
            profile starts over from this one's settings.
        settings: changes to the settings, such as `["train.max_steps=20"]`.
        root: the folder that holds the runs; None takes `$QLORA_RUNS`, else `runs`.

    Raises:
        ConfigError: settings are unknown or wrong; the message lists all of them.
        RunError: a setting would change that is fixed once the run has trained, or the name can't be that of a run.
    """
    run = run_at(name, root)
    settings = settings if isinstance(settings, dict) else list(settings)
    old = run.config() if run.exists() else None
    if old is None or (profile is not None and profile != old.profile):
        config = profile_config(profile or os.environ.get("QLORA_PROFILE") or "demo")
    else:
        config = old
    config = config.with_settings(settings)
    if any(str(setting).partition("=")[0].strip() == buckets.SETTING for setting in settings):
        buckets.confirm(config)
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
    """Creates a run, or opens the run of that name if it has the same settings.

    Args:
        name, profile, settings, root: as for `open_run`.

    Raises:
        ConfigError: settings are unknown or wrong; the message lists all of them.
        RunError: there is a run of that name with other settings, which the message names; nothing is changed.
    """
    run = run_at(name, root)
    settings = settings if isinstance(settings, dict) else list(settings)
    wanted = profile_config(profile or os.environ.get("QLORA_PROFILE") or "demo").with_settings(settings)
    refuse_other_settings(run, wanted)
    if not run.exists():
        run.save_config(wanted)
    return run


def refuse_other_settings(run: Run, wanted: RunConfig) -> None:
    """Refuses settings that a run would be made with, if there is a run of that name with other ones.

    Raises:
        RunError: there is; the message names the differences.
    """
    if not run.exists() or run.config() == wanted:
        return
    asked, has = _by_name(wanted), _by_name(run.config())
    found = [f"{key}={has[key]!r}, not {asked[key]!r}" for key in has if has[key] != asked[key]]
    rest = [f"and {len(found) - MOST_NAMED} more"] if len(found) > MOST_NAMED else []
    raise RunError(
        f"there is a run {run.name!r} already, with other settings",
        expected="a new name, or the settings that the run has",
        got="; ".join([*found[:MOST_NAMED], *rest]),
        next_step="Choose another name, or go on with this run: open_run.",
    )


def clone_run(run: Run, name: str, *, settings: Iterable[str] | dict[str, Any] = ()) -> Run:
    """Creates a run with another one's settings, in the same folder of runs; nothing is trained yet.

    Args:
        run: the run whose settings are copied.
        name: the new run's name.
        settings: changes to the settings, as for `open_run`.

    Raises:
        ConfigError: settings are unknown or wrong.
        RunError: there is a run of that name, the name can't be that of a run, or the settings name a bucket that nobody has
            named on this machine.
    """
    made = Run(run.folder.parent / name)
    if made.folder.parent != run.folder.parent or made.folder.exists():
        raise RunError(f"there is a run {name!r} already", next_step="Choose another name.")
    config = run.config()
    buckets.refuse_unconfirmed(config)
    made.save_config(config.with_settings(settings))
    return made


def existing_run(name: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Run:
    """Opens a run that must exist.

    Args:
        name: the run's name below `root`, or a path.
        root: as for `open_run`.

    Raises:
        RunError: it does not exist, and the message names the runs that do; or the name can't be that of a run.
    """
    run = run_at(name, root)
    if not run.exists():
        existing = ", ".join(found.name for found in find_runs(run.folder.parent)) or "none"
        raise RunError(f"there is no run {run.name!r}", got=f"these runs: {existing}", next_step="Train one first.")
    return run


def _by_name(config: RunConfig) -> dict[str, Any]:
    """Returns the settings by their full names, such as `train.max_steps`, and the profile."""
    sections = config.to_dict()
    profile = {"profile": sections.pop("profile")}
    return profile | {
        f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()
    }


def run_at(name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Run:
    """Returns the run of a name or path, whether it exists or not.

    Args:
        name: the run's name below `root`, or a path.
        root: as for `open_run`.

    Raises:
        RunError: the name can't be that of a run, or its folder holds links.
    """
    path = Path(name)
    if ".." in path.parts and not path.is_absolute():
        raise RunError(
            "this can't be the name of a run",
            expected="a name below the runs folder, or a path without '..'",
            got=repr(str(name)),
            next_step="Give an absolute path if the run is somewhere else.",
        )
    # Path("").name and Path(".").name are empty: joined to the root, they would be the root itself.
    is_path = os.sep in str(name) or not path.name
    run = Run(path if is_path else runs_root(root) / name)
    refuse_links(run.folder)
    return run


def runs_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder that holds the runs: the one given, else `$QLORA_RUNS`, else `runs`."""
    return Path(root or os.environ.get("QLORA_RUNS") or "runs")


def find_runs(root: str | os.PathLike[str] = "runs") -> list[Run]:
    """Returns all runs below a folder, in the order of their names."""
    return [Run(path.parent) for path in sorted(Path(root).glob("*/config.json")) if is_run_name(path.parent.name)]
