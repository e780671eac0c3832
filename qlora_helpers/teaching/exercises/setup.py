"""Exercises of notebook 00: extend a search path, and repair settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_helpers.teaching.exercise import Exercise, Wrong, call


def extended(current, folder):
    """The solution of `extend_a_path`."""
    entries = [folder, *current.split(":")]
    return ":".join(dict.fromkeys(entry for entry in entries if entry))


def _judge_path(function: Any) -> str:
    from qlora_helpers.machine.cuda_libraries import extend_library_path

    folder = "/opt/cuda/lib"
    cases = {
        "overwrites": "/opt/site/lib:/usr/local/extra",
        "empty-part": "",
        "doubles": f"{folder}:/opt/site/lib",
    }
    for code, current in cases.items():
        environment = {"LD_LIBRARY_PATH": current}
        right = extend_library_path([folder], environment)
        got = call(function, current, folder)
        if not isinstance(got, str):
            raise Wrong(message=f"Return a text; got {type(got).__name__}.")
        if got == right:
            continue
        parts = got.split(":")
        if parts[-1] == folder and parts[:-1] == [each for each in current.split(":") if each]:
            raise Wrong("appends")
        if code == "overwrites" and got != folder:
            raise Wrong(message=f"From {current!r} expected {right!r}; got {got!r}.")
        raise Wrong(code, got=repr(got))
    return "Three cases agree: the new folder comes first, the old ones stay, none is empty and none comes twice."


EXTEND_A_PATH = Exercise(
    name="extend_a_path",
    title="Extend a search path",
    kind="write",
    minutes=5,
    question="Write extended(current, folder): the value of LD_LIBRARY_PATH and a folder become the new value, with the "
    "folder in front.",
    judge=_judge_path,
    misconceptions={
        "overwrites": "The folders that were there are gone, and with them the libraries that other programs need. The "
        "2023 recipe made "
        "this mistake.",
        "appends": "The new folder comes last: libraries of the same name in earlier folders are found first.",
        "empty-part": "{got} has an empty part, or is not what an empty path becomes. An empty part means the current "
        "folder: whoever "
        "can write there decides what is loaded.",
        "doubles": "A folder that was there already comes twice. A cell that is run again must change nothing.",
    },
    hints=(
        "current.split(':') gives the folders, and ':'.join(...) makes a path of them.",
        "Leave out empty parts and those that came before: dict.fromkeys keeps the first of each and their order.",
    ),
    solution_is=extended,
)

BROKEN_SETTINGS = {"train.learning_rte": 0.0002, "adapter.r": 0, "data.template": "alpaca", "train.epochs": 1}
"""What the exercise starts from: three of these are refused."""


def _judge_settings(settings: Any) -> str:
    from qlora_helpers.base.errors import ConfigError
    from qlora_helpers.base.profiles import profile_config

    if not isinstance(settings, Mapping):
        raise Wrong(message="Hand over a dictionary of settings and values.")
    try:
        config = profile_config("demo").with_settings(dict(settings))
    except ConfigError as error:
        raise Wrong("refused", count=len(error.problems), first=error.problems[0]) from None
    wanted = {"train.learning_rate", "adapter.r", "data.template", "train.epochs"}
    missing = sorted(wanted - set(settings))
    if missing:
        raise Wrong("dropped", missing=", ".join(missing))
    if config.train.learning_rate != 0.0002 or config.train.epochs != 1:
        raise Wrong("changed")
    return (
        f"All four settings are taken: learning rate {config.train.learning_rate}, rank {config.adapter.r}, one epoch."
    )


REPAIR_SETTINGS = Exercise(
    name="repair_settings",
    title="Repair settings",
    kind="break and fix",
    minutes=4,
    question="Three of the four settings in BROKEN_SETTINGS are refused. Hand over a dictionary in which all four are set "
    "and taken.",
    judge=_judge_settings,
    misconceptions={
        "refused": "{count} still refused: {first}",
        "dropped": "A setting that is left out takes the profile's value in silence. Still missing: {missing}.",
        "changed": "A value that was right has changed: repair the three that are refused alone.",
    },
    hints=(
        "Ask: ql.profile_config('demo').with_settings(BROKEN_SETTINGS). The error lists all problems at once.",
        "A misspelt name gets the nearest known one; a wrong value gets what is allowed.",
    ),
    solution_is='{"train.learning_rate": 0.0002, "adapter.r": 8, "data.template": "plain", "train.epochs": 1}',
)
