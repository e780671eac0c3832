"""What a person hands to make is data: a file's name runs no command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def made(tmp_path):
    """Runs make in an environment that seems installed, whose Python writes down what it is called with."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(tmp_path / 'calls')!r}, 'a').write(repr(sys.argv[1:]) + '\\n')\n"
    )
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()

    def made(*arguments: str, **environment: str) -> str:
        command = ["make", "-C", str(ROOT), "-o", "requirements.lock", f"VENV={tmp_path / 'venv'}", *arguments]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "calls").read_text()

    return made


def test_a_data_file_with_any_name_is_handed_on(made, tmp_path):
    for name in (
        "my dialogues.csv",
        "a'b.csv",
        'a"b.csv',
        "$(touch x).csv",
        "`touch x`.csv",
        "a;touch x.csv",
        "$HOME.csv",
    ):
        path = f"{tmp_path}/{name}".replace("touch x", f"touch {tmp_path}/ran")
        assert made("demo", f"DATA={path}").splitlines()[-1] == repr(["-m", "qlora_helpers", "demo", "--data", path])
        assert made("demo", DATA=path).splitlines()[-1] == repr(["-m", "qlora_helpers", "demo", "--data", path])
    assert not (tmp_path / "ran").exists()


def test_make_s_own_functions_are_not_run(made, tmp_path):
    path = f"$(shell touch {tmp_path}/ran).csv"
    assert path in made("demo", f"DATA={path}")
    assert not (tmp_path / "ran").exists()


def test_without_a_data_file_there_is_no_option(made):
    assert made("demo") == "['-m', 'qlora_helpers', 'demo']\n"
