"""Tests that share what their file makes once are run by one process of several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import groups

FILE = """
import pytest

@pytest.fixture(scope="module")
def once():
    with open({log!r}, "a") as log:
        print({name!r}, file=log)

@pytest.mark.parametrize("number", range(4))
def test_shared(once, number):
    pass
"""


def test_what_a_file_makes_once_is_made_once_in_two_processes(tmp_path):
    log = tmp_path / "made"
    names = [f"test_{number}.py" for number in range(3)]
    for name in names:
        (tmp_path / name).write_text(FILE.format(log=str(log), name=name))
    options = ["-p", "groups", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={tmp_path}", *options, str(tmp_path)]
    path = os.pathsep.join([str(Path(groups.__file__).parent), own.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=tmp_path, env=own | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert "12 passed" in done.stdout, done.stdout + done.stderr
    assert sorted(log.read_text().split()) == names


def test_a_file_may_name_the_group_of_another():
    tests = Path(groups.__file__).parent
    assert groups.group_of(tests / "serving" / "test_serving_refused.py") == "test_server"
    assert groups.group_of(tests / "serving" / "test_server.py") == "test_server"
    assert groups.group_of(tests / "base" / "test_config.py") is None
