"""Installs the locked packages, PyTorch for this machine and this package into a virtual environment; `make` calls it.

    python tools/install.py [--venv .venv] [--dev]      TORCH=auto|cpu|cuda chooses PyTorch's build
    python tools/install.py --venv .venv-book --book    what builds the book, and nothing else

Uses uv where it is installed and pip elsewhere, and needs the standard library alone. On Linux PyTorch comes for the CPU where
there is no NVIDIA driver (192 MB where the CUDA build takes 3 GB); where PyTorch's own index can't be reached it comes from the
index that pip uses for everything else.
"""

from __future__ import annotations

import argparse
import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
OLDEST_MACOS = 14
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
INDEX_TIMEOUT_S = 5
DRIVER_SIGNS = ("/proc/driver/nvidia/version", "/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libcuda.so*")
CHOICES = ("auto", "cpu", "cuda")


def main(arguments: list[str] | None = None) -> int:
    """Installs and returns the exit code: 2 where this machine or a choice is refused, else that of what failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", default=".venv", help="the environment's folder; made where it is missing")
    parser.add_argument("--dev", action="store_true", help="also what the tests and checks need")
    parser.add_argument(
        "--book", action="store_true", help="what builds the book, alone: neither PyTorch nor this package"
    )
    options = parser.parse_args(arguments)
    choice = os.environ.get("TORCH") or "auto"
    problem = refusal() or ("" if choice in CHOICES else f"TORCH is {choice!r}, expected one of {', '.join(CHOICES)}.")
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    try:
        install(Path(options.venv).absolute(), choice, dev=options.dev, book=options.book)
    except subprocess.CalledProcessError as error:
        print(f"error: this failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return error.returncode or 1
    return 0


def refusal() -> str:
    """Why nothing can be installed on this machine, in one sentence; empty where it can."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        return f"Python 3.11 or newer is needed and this is {found}: name one with PYTHON=python3.12."
    if platform.system() == "Darwin":
        if platform.machine() != "arm64":
            return "PyTorch has no build for Intel Macs or an Intel Python: use Python for Apple silicon, or Linux."
        version = platform.mac_ver()[0]
        if int(version.split(".")[0] or 0) < OLDEST_MACOS:
            return f"PyTorch needs macOS {OLDEST_MACOS} or newer and this is macOS {version}: update it, or use Linux."
    return ""


def install(venv: Path, choice: str, *, dev: bool, book: bool = False) -> None:
    """Makes the environment where it is missing and installs into it.

    Raises:
        subprocess.CalledProcessError: a command failed; it has said why.
    """
    uv = shutil.which("uv")
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = venv / scripts / ("python.exe" if os.name == "nt" else "python")
    if not python.exists():
        run([uv, "venv", "--quiet", "--seed", "--python", sys.executable, venv] if uv else venv_command(venv))
    pip: list[str | Path] = [uv, "pip"] if uv else [python, "-m", "pip", "--disable-pip-version-check"]
    into: list[str | Path] = ["--quiet", "--python", python] if uv else ["--quiet"]
    say(f"Installing into {venv.name} with {'uv' if uv else 'pip'}; the first time takes some minutes.")
    # torch's other requirements are in the lock, so that its own index need not have them.
    locked: list[str | Path] = [*pip, "install", *into, "--require-hashes", "--no-deps"]
    if book:
        run([*locked, "-r", ROOT / "requirements-book.lock"])
        return
    run([*locked, "-r", ROOT / "requirements.lock"])
    install_torch(pip, into, python, choice, with_uv=bool(uv))
    if dev:
        run([*locked, "-r", ROOT / "requirements-dev.lock"])
    run([*pip, "install", *into, "--no-deps", "-e", ROOT])


def venv_command(venv: Path) -> list[str | Path]:
    """How an environment is made without uv; says what is missing on Debian and Ubuntu."""
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        say("This Python can't make environments with pip: install python3-venv (apt-get install python3-venv) or uv.")
    return [sys.executable, "-m", "venv", venv]


def install_torch(pip: list[str | Path], into: list[str | Path], python: Path, choice: str, *, with_uv: bool) -> None:
    """Installs the pinned torch in the build that fits, from PyTorch's own index or, where that fails, the usual one."""
    pin, build = torch_pin(), torch_build(choice)
    version, there = installed_torch(python)
    changed = choice != "auto" and build and there and there != build
    if f"torch=={version}" == pin and not changed:
        return
    if changed:
        run([*pip, "uninstall", *into, *([] if with_uv else ["--yes"]), "torch"])
    command = [*pip, "install", *into, pin]
    special: list[str | Path] = []
    if build == "cpu":
        special = ["--torch-backend", "cpu"] if with_uv else ["--index-url", CPU_INDEX]
    elif build == "cuda" and with_uv and has_nvidia_driver():
        special = ["--torch-backend", "auto"]  # the CUDA version that the driver runs
    if build:
        say(f"PyTorch: the build for {'the CPU' if build == 'cpu' else 'CUDA'}; TORCH=cpu or TORCH=cuda chooses.")
    if special and not reachable(CPU_INDEX):
        say("PyTorch's own index can't be reached: PyTorch comes from the usual one, which may hold a larger build.")
    elif special and run([*command, *special], check=False) != 0:
        say("PyTorch's own index failed: PyTorch comes from the usual one, which may hold a larger build.")
    elif special:
        return
    run(command)


def torch_build(choice: str) -> str:
    """`cpu` or `cuda` on Linux; empty elsewhere, where there is one build."""
    if platform.system() != "Linux":
        return ""
    return choice if choice != "auto" else "cuda" if has_nvidia_driver() else "cpu"


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded here, or its tool is."""
    return any(glob.glob(sign) for sign in DRIVER_SIGNS) or shutil.which("nvidia-smi") is not None


def torch_pin() -> str:
    """The line of requirements.txt that names torch."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return re.findall(r"^torch==\S+", text, re.MULTILINE)[0]


def installed_torch(python: Path) -> tuple[str, str]:
    """Version, and `cpu` or `cuda`, by what torch in the environment says of itself; empty where there is none."""
    code = (
        "import importlib.util as u, pathlib as p; s = u.find_spec('torch');"
        " print((p.Path(s.origin).parent / 'version.py').read_text() if s else '')"
    )
    text = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, text=True).stdout
    found = [re.search(rf"^{name}\b[^=]*=\s*(.*)$", text, re.MULTILINE) for name in ("__version__", "cuda")]
    if not all(found):
        return "", ""
    version, cuda = (match[1].strip().strip("'") for match in found if match)
    return version.split("+")[0], "cpu" if cuda == "None" else "cuda"


def reachable(index: str) -> bool:
    """Whether a package index answers for torch; asked twice, a few seconds each."""
    for _ in range(2):
        try:
            with urllib.request.urlopen(f"{index}/torch/", timeout=INDEX_TIMEOUT_S) as answer:
                return 200 <= answer.status < 300
        except (OSError, urllib.error.URLError, ValueError):
            continue
    return False


def run(command: list[str | Path], *, check: bool = True) -> int:
    """Runs a command, its output shown; returns its exit code."""
    return subprocess.run([str(part) for part in command], check=check).returncode


def say(text: str) -> None:
    """Prints a line at once, in order with what the commands print."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
