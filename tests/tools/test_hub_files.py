"""The lifecycle script of a Studio space on a made-up home, and the variables of a hub's learners."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "workshop" / "setup"
SCRIPT = SETUP / "studio_lifecycle.sh"
SPEC = importlib.util.spec_from_file_location("hub_config", SETUP / "jupyterhub_config.py")
hub = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hub)


@pytest.fixture
def space(tmp_path):
    """A home with an installed project, whose Python writes down what it is called with."""
    project = tmp_path / "qlora"
    (project / "tools").mkdir(parents=True)
    (project / "tools" / "install.py").write_text("open('installed', 'w').close()\n")
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n')
    python.chmod(0o755)
    (project / ".venv" / ".installed").touch()
    return tmp_path


def run(space, *arguments):
    environment = {"PATH": os.environ["PATH"], "HOME": str(space)}
    done = subprocess.run(["sh", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, "a script that fails keeps the space from starting"
    return done.stdout


def test_a_start_registers_the_kernel(space):
    assert "registered" in run(space)
    call = (space / "calls").read_text()
    assert "--name qlora" in call and "--env OMP_WAIT_POLICY PASSIVE" in call


def test_the_first_start_installs_and_a_space_without_the_project_still_starts(space):
    (space / "qlora/.venv/.installed").unlink()
    run(space, "--wait")
    assert (space / "qlora/installed").exists() and (space / "qlora/.venv/.installed").exists()
    (space / "qlora/tools/install.py").unlink()
    assert "nothing was done" in run(space)


def test_a_learner_s_threads_are_a_share_of_the_cores():
    assert hub.environment(64, 30)["OMP_NUM_THREADS"] == "2"
    assert hub.environment(8, 30)["OMP_NUM_THREADS"] == "1"
    found = hub.environment(8, 2, "/srv/x")
    assert found["OMP_WAIT_POLICY"] == "PASSIVE" and found["QLORA_BOARD"] == "/srv/x/board"
