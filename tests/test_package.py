"""Importing: every module loads, and what a form, a plan or the setup report needs loads no torch."""

from __future__ import annotations

import configparser
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_helpers

FOLDER = Path(qlora_helpers.__file__).parent
# Rooms whose modules subclass and decorate with torch and transformers; the import contract names what in them must not.
HEAVY_ROOMS = ("model", "training", "evaluation")
CONTRACTS = configparser.ConfigParser()
CONTRACTS.read(FOLDER.parent / ".importlinter")
LIGHT = [
    name.removeprefix("qlora_helpers.")
    for name in CONTRACTS["importlinter:contract:no-torch"]["source_modules"].split()
]
LAYERS = [
    {name.strip() for name in line.split("|")}
    for line in CONTRACTS["importlinter:contract:rooms"]["layers"].strip().splitlines()
]
SLOW_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "tensorboardX", "datasets")


def modules() -> list[str]:
    """Every module of the package, those in folders too."""
    found = [path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.py")]
    return sorted(".".join(path.parts).removesuffix("__init__").rstrip(".") for path in found)


def loaded_after(names: list[str]) -> set[str]:
    """What is in `sys.modules` of a new process after it imported modules of the package."""
    lines = [f"importlib.import_module({('qlora_helpers.' + name).rstrip('.')!r})" for name in names]
    code = "\n".join(["import importlib, json, sys", *lines, "print(json.dumps(sorted(sys.modules)))"])
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:qlora_helpers", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    (printed,) = done.stdout.splitlines()  # importing prints nothing
    return set(json.loads(printed))


def test_every_module_loads():
    names = modules()
    assert len(names) >= 30
    loaded = loaded_after(names)
    assert {f"qlora_helpers.{name}".rstrip(".") for name in names} <= loaded
    assert "torch" in loaded  # so that the test below can fail


def is_light(name: str) -> bool:
    """Whether importing a module may load no slow library: named by the contract, or in no heavy room."""
    return any((name + ".").startswith(f"{light}.") for light in LIGHT) or name.split(".")[0] not in HEAVY_ROOMS


def test_what_answers_at_once_loads_no_torch():
    names = [name for name in modules() if is_light(name)]
    assert len(names) >= 80
    loaded = loaded_after(names)
    assert not loaded.intersection(SLOW_LIBRARIES)


def test_every_room_stands_in_the_layers_and_says_what_it_holds():
    rooms = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert len(rooms) >= 11
    assert rooms | {path.stem for path in FOLDER.glob("[a-z]*.py")} | {"__main__"} == set().union(*LAYERS)
    for folder in [path.parent for path in FOLDER.rglob("__init__.py")]:
        assert importlib.import_module(
            f"qlora_helpers.{'.'.join(folder.relative_to(FOLDER).parts)}".rstrip(".")
        ).__doc__


@pytest.mark.parametrize(
    "name",
    [
        "base.config",
        "base.errors",
        "runs.folder",
        "machine.environment",
        "machine.workspace",
        "machine.cuda_libraries",
        "machine.telemetry",
    ],
)
def test_what_runs_before_the_requirements_are_installed_needs_the_standard_library_alone(name):
    loaded = loaded_after([name])
    others = {module.split(".")[0] for module in loaded} - set(sys.stdlib_module_names) - {"qlora_helpers", "__main__"}
    others = {module for module in others if not module.startswith(("_", "sitecustomize", "zipimport"))}
    assert not others


def test_the_version_is_the_distribution_s():
    import importlib.metadata

    assert importlib.metadata.version("qlora_helpers") == qlora_helpers.__version__
