"""The code and the command that make a run with given settings, for a person to copy out of a form.

Settings are written as differences from the profile that they started from. This module knows nothing of widgets.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.profiles import PROFILES, profile_config
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.opening import runs_root


def differences(config: RunConfig, other: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the settings in which two configurations differ: `section.key` -> the first value and the other."""
    before, after = config.to_dict(), other.to_dict()
    return {
        f"{section}.{key}": (value, after[section][key])
        for section, values in before.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != after[section][key]
    }


def change_text(changes: dict[str, tuple[Any, Any]]) -> str:
    """Returns what `differences` found in one line, the old values before the new ones."""
    return ", ".join(f"{name} {_plain(old)} → {_plain(new)}" for name, (new, old) in changes.items())


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(value)
    return "automatic" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def as_setting(name: str, value: Any) -> str:
    """Returns `name=value` in the form of `--set` and `open_run`."""
    if isinstance(value, list | tuple):
        return f"{name}={','.join(value)}"
    return f"{name}={value if isinstance(value, str) else json.dumps(value).replace('null', 'none')}"


def settings_code(run: Run, config: RunConfig, saved: RunConfig | None = None) -> str:
    """Returns Python that opens the run with these settings, whether it exists yet or not.

    Args:
        run: the run to name.
        config: the settings.
        saved: the settings in `config.json`; differences from them are written too.
    """
    start = f"run = workflow.open_run({_name(run)!r}, profile={_profile(config)!r}"
    settings = _settings(config, saved)
    if not settings:
        return f"{start})"
    lines = "".join(f"    {json.dumps(item, ensure_ascii=False)},\n" for item in settings)
    return f"{start}, settings=[\n{lines}])"


def settings_command(run: Run, config: RunConfig, saved: RunConfig | None = None) -> str:
    """Returns the command that trains with these settings; the arguments are those of `settings_code`."""
    words = ["python", "-m", "qlora_helpers", "train", _name(run), "--profile", _profile(config)]
    lines = [shlex.join(words), *(f"--set {shlex.quote(item)}" for item in _settings(config, saved))]
    return " \\\n    ".join(lines)


def _settings(config: RunConfig, saved: RunConfig | None) -> list[str]:
    changed = differences(config, profile_config(_profile(config))) | (differences(config, saved) if saved else {})
    return [as_setting(name, value) for name, (value, _) in changed.items()]


def _profile(config: RunConfig) -> str:
    return config.profile if config.profile in PROFILES else "demo"


def _name(run: Run) -> str:
    """Returns the run's name if it is in the usual folder, else its path."""
    usual = runs_root().resolve() / run.name
    return run.name if run.folder.resolve() == usual else str(run.folder)
