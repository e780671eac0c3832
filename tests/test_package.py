"""Importing: every module loads, and what a form, a plan or the setup report needs loads no torch."""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

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


def test_the_face_gives_functions_even_after_every_room_was_imported_and_loads_no_torch():
    rooms = sorted({name.split(".")[0] for name in modules() if is_light(name) and name})
    assert {"base", "runs", "views", "workflow"} <= set(rooms)
    code = f"""
import importlib, json, sys, types
import qlora_helpers as ql
assert not set({SLOW_LIBRARIES}) & set(sys.modules), "the import alone"
for room in {rooms}:
    importlib.import_module("qlora_helpers." + room)
found = {{name: type(getattr(ql, name)).__name__ for name in ql.__all__}}
assert not set({SLOW_LIBRARIES}) & set(sys.modules), "the names"
assert set(ql.__all__) <= set(dir(ql))
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= 25
    assert "module" not in found.values() and set(found) == set(qlora_helpers.__all__)


def test_no_public_name_is_a_room_s():
    taken = {name.split(".")[0] for name in modules()} | {"teaching", "__main__"}
    assert not taken & set(qlora_helpers.__all__)


def test_editors_see_the_names_that_the_table_holds():
    tree = ast.parse(Path(qlora_helpers.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            value = getattr(importlib.import_module(node.module), alias.name)
            seen[alias.asname or alias.name] = value
    assert list(seen) != [] and set(seen) == set(qlora_helpers.__all__)
    assert all(getattr(qlora_helpers, name) is value for name, value in seen.items())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="trian"):
        qlora_helpers.trian  # noqa: B018
    assert not hasattr(qlora_helpers, "_homes")


def test_the_console_script_is_the_command_line():
    from qlora_helpers.__main__ import main, parser

    text = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["project"]["scripts"] == {"qlora": f"{main.__module__}:{main.__name__}"}
    with mock.patch.object(sys, "argv", ["/somewhere/bin/qlora", "doctor"]):
        assert parser().prog == "qlora"
    assert parser().prog == "python -m qlora_helpers"


def test_the_version_is_the_distribution_s():
    assert importlib.metadata.version("qlora_helpers") == qlora_helpers.__version__


def test_the_map_in_contributing_is_the_rooms_own():
    spec = importlib.util.spec_from_file_location("map", FOLDER.parent / "tools" / "map.py")
    maps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maps)
    page = (FOLDER.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert page == maps.with_map(page), "run: python tools/map.py"
    for room in {path.parent.name for path in FOLDER.rglob("*/__init__.py")} - {"qlora_helpers"}:
        assert re.search(rf"`(\w+/)*{room}/`", page), room
