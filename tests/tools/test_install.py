"""The installer with fake pip and uv: what it runs on which machine, and what it refuses before anything is downloaded."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import platform
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
install = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(install)

FAKE = """#!/bin/sh
PATH=/usr/bin:/bin
case "$*" in *find_spec*) cat "{torch}" 2>/dev/null; exit 0;; esac
echo "$0 $*" >> "{log}"
case "$*" in *{failing}*) exit 1;; esac
"""
CPU_TORCH = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n"
CUDA_TORCH = "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n"


class Machine:
    """A folder with a fake environment and a PATH with nothing but, where asked for, a fake uv."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.log, self.torch, self.venv = folder / "log", folder / "torch-version.py", folder / "venv"
        self.failing = "nothing-fails"
        monkeypatch.setenv("PATH", str(folder / "path"))
        monkeypatch.delenv("TORCH", raising=False)
        monkeypatch.setattr(install, "DRIVER_SIGNS", ())
        monkeypatch.setattr(platform, "system", lambda: "Linux")
        monkeypatch.setattr(install, "reachable", lambda index: True)

    def fake(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE.format(torch=self.torch, log=self.log, failing=self.failing))
        path.chmod(0o755)

    def run(self, *arguments: str, uv: bool = False, **environment: str) -> tuple[int, list[str]]:
        """The exit code, and the commands with the folder left out."""
        self.fake(self.venv / "bin" / "python")
        if uv:
            self.fake(self.folder / "path" / "uv")
        for name, value in environment.items():
            self.monkeypatch.setenv(name, value)
        self.log.unlink(missing_ok=True)
        code = install.main(["--venv", str(self.venv), *arguments])
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return code, [line.replace(f"{self.folder}/", "").replace(f"{ROOT}/", "") for line in lines]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def of_torch(commands: list[str]) -> list[str]:
    return [line for line in commands if " torch" in line]


def test_pip_installs_the_lock_then_torch_s_cpu_build_then_the_package(machine, capsys):
    code, commands = machine.run()
    pip = "venv/bin/python -m pip --disable-pip-version-check install --quiet"
    assert code == 0
    assert commands == [
        f"{pip} --require-hashes --no-deps -r requirements.lock",
        f"{pip} {install.torch_pin()} --index-url https://download.pytorch.org/whl/cpu",
        f"{pip} --no-deps -e {ROOT}",
    ]
    assert "build for the CPU" in capsys.readouterr().out


def test_what_the_tests_need_is_locked_too(machine):
    _, commands = machine.run("--dev")
    assert [line for line in commands if line.endswith("--require-hashes --no-deps -r requirements-dev.lock")]


def test_the_book_s_environment_holds_nothing_else(machine):
    code, commands = machine.run("--book")
    assert code == 0 and len(commands) == 1
    assert commands[0].endswith("--require-hashes --no-deps -r requirements-book.lock")


def test_uv_is_taken_where_it_is_installed(machine):
    code, commands = machine.run(uv=True)
    assert code == 0 and len(commands) == 3
    assert all(line.startswith("path/uv pip install --quiet --python venv/bin/python") for line in commands)
    assert of_torch(commands)[0].endswith(f"{install.torch_pin()} --torch-backend cpu")


def test_an_nvidia_driver_brings_the_cuda_build(machine):
    machine.monkeypatch.setattr(install, "DRIVER_SIGNS", (str(machine.folder / "nvidia*"),))
    (machine.folder / "nvidia0").touch()
    (of_pip,) = of_torch(machine.run()[1])
    assert of_pip.endswith(f"install --quiet {install.torch_pin()}")
    (of_uv,) = of_torch(machine.run(uv=True)[1])
    assert of_uv.endswith("--torch-backend auto")
    (chosen,) = of_torch(machine.run(TORCH="cpu", uv=True)[1])
    assert chosen.endswith("--torch-backend cpu")


@pytest.mark.parametrize("uv", [False, True])
def test_the_cuda_build_can_be_chosen_without_a_driver(machine, uv):
    (command,) = of_torch(machine.run(uv=uv, TORCH="cuda")[1])
    assert command.endswith(install.torch_pin())


@pytest.mark.parametrize("uv", [False, True])
def test_where_pytorch_s_index_is_out_of_reach_the_usual_one_is_taken_and_one_line_says_so(machine, capsys, uv):
    machine.monkeypatch.setattr(install, "reachable", lambda index: False)
    code, commands = machine.run(uv=uv)
    (command,) = of_torch(commands)
    assert code == 0 and command.endswith(install.torch_pin())
    assert capsys.readouterr().out.count("can't be reached") == 1


def test_where_pytorch_s_index_fails_the_usual_one_is_taken(machine, capsys):
    machine.failing = "--index-url"
    code, commands = machine.run()
    first, second = of_torch(commands)
    assert code == 0 and "--index-url" in first and second.endswith(install.torch_pin())
    assert "PyTorch's own index failed" in capsys.readouterr().out


def test_an_unreachable_index_is_given_up_within_seconds():
    started = time.monotonic()
    assert not install.reachable("http://127.0.0.1:9/whl/cpu")
    assert not install.reachable("not an address")
    assert time.monotonic() - started < 2 * install.INDEX_TIMEOUT_S


def test_an_index_that_answers_is_reachable(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "torch").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert install.reachable(address)
        assert not install.reachable(f"{address}/elsewhere")
        server.shutdown()


def test_torch_that_is_there_stays_unless_another_build_is_chosen(machine):
    machine.torch.write_text(CUDA_TORCH)
    assert of_torch(machine.run()[1]) == []
    removed, again = of_torch(machine.run(TORCH="cpu")[1])
    assert removed.endswith("uninstall --quiet --yes torch") and "--index-url" in again
    machine.torch.write_text(CPU_TORCH)
    assert of_torch(machine.run(TORCH="cpu")[1]) == []


def test_another_version_of_torch_is_replaced_by_the_same_build(machine):
    machine.torch.write_text(CPU_TORCH.replace("2.13.0", "2.12.0"))
    (command,) = of_torch(machine.run()[1])
    assert command.endswith(f"{install.torch_pin()} --index-url {install.CPU_INDEX}")


def test_this_environment_s_torch_is_recognised():
    import torch

    version, build = install.installed_torch(Path(sys.executable))
    assert version == torch.__version__.split("+")[0]
    assert build == ("cuda" if torch.version.cuda else "cpu")


@pytest.mark.parametrize("uv", [False, True])
def test_a_missing_environment_is_made_first(machine, uv, monkeypatch):
    made = []
    monkeypatch.setattr(install, "run", lambda command, check=True: made.append([str(part) for part in command]) or 0)
    if uv:
        machine.fake(machine.folder / "path" / "uv")
    monkeypatch.setattr(install, "installed_torch", lambda python: ("", ""))
    assert install.main(["--venv", str(machine.folder / "new")]) == 0
    new = str(machine.folder / "new")
    by_uv = [shutil.which("uv"), "venv", "--quiet", "--seed", "--python", sys.executable, new]
    assert made[0] == (by_uv if uv else [sys.executable, "-m", "venv", new])
    assert len(made) == 4


def test_what_fails_is_named_and_ends_the_installation(machine, capsys):
    machine.failing = "requirements.lock"
    code, commands = machine.run()
    assert code == 1 and len(commands) == 1
    assert "requirements.lock" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("system", "processor", "macos", "python", "named"),
    [
        ("Darwin", "x86_64", "15.1", (3, 12, 1), "Intel Macs"),
        ("Darwin", "arm64", "13.7.2", (3, 12, 1), "macOS 14 or newer and this is macOS 13.7.2"),
        ("Linux", "x86_64", "", (3, 10, 14), "Python 3.11 or newer is needed and this is 3.10.14"),
    ],
)
def test_machines_that_can_t_work_are_refused_in_one_sentence(machine, capsys, system, processor, macos, python, named):
    machine.monkeypatch.setattr(platform, "system", lambda: system)
    machine.monkeypatch.setattr(platform, "machine", lambda: processor)
    machine.monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), ""))
    machine.monkeypatch.setattr(install.sys, "version_info", python)
    code, commands = machine.run()
    output = capsys.readouterr()
    assert code == 2 and commands == [] and output.out == ""
    assert named in output.err and output.err.count("\n") == 1


def test_an_apple_silicon_mac_takes_the_one_build_there_is(machine):
    machine.monkeypatch.setattr(platform, "system", lambda: "Darwin")
    machine.monkeypatch.setattr(platform, "machine", lambda: "arm64")
    machine.monkeypatch.setattr(platform, "mac_ver", lambda: ("14.0", ("", "", ""), ""))
    (command,) = of_torch(machine.run(TORCH="cpu")[1])
    assert command.endswith(f"install --quiet {install.torch_pin()}")


def test_an_unknown_choice_is_refused(machine, capsys):
    assert machine.run(TORCH="rocm") == (2, [])
    assert "expected one of auto, cpu, cuda" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_hands_the_choice_on_and_refuses_an_old_python(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in -c) exit "${OLD:-0}";; esac\necho "TORCH=$TORCH $*"\n')
    python.chmod(0o755)
    call = ["make", "-C", str(ROOT), f"PYTHON={python}", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/.installed-dev"]
    (tmp_path / "venv").mkdir()
    done = install.subprocess.run([*call, "TORCH=cuda"], capture_output=True, text=True)
    assert done.returncode == 0 and f"TORCH=cuda tools/install.py --venv {tmp_path}/venv --dev" in done.stdout
    (tmp_path / "venv" / ".installed-dev").unlink()
    done = install.subprocess.run(call, capture_output=True, text=True, env=os.environ | {"OLD": "1"})
    assert done.returncode == 2 and "Python 3.11 or newer is needed" in done.stderr
