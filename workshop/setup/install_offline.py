"""Installs the workshop from the stick that this file lies on, without a network: python install_offline.py [FOLDER]

It compares every file that it uses with SHA256SUMS, copies the project into FOLDER (`~/qlora-workshop`), makes an environment
there and installs the wheels of this platform and Python by their checksums, with the stick's uv where it runs and with pip
elsewhere. Standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

STICK = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Installs, and returns 2 where something is refused."""
    given = sys.argv[1:] if arguments is None else arguments
    folder = Path(given[0] if given else "~/qlora-workshop").expanduser().absolute()
    try:
        install(folder)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Installed. Now: cd {folder} && .venv/bin/python workshop/setup/preflight.py && HF_HUB_OFFLINE=1 make lab")
    return 0


class Refused(Exception):
    """Nothing more is installed, and why in one sentence."""


def target_name() -> str:
    """This machine's set of wheels."""
    system = {"Darwin": "macos", "Linux": "linux"}.get(platform.system(), platform.system().lower())
    return f"{system}-{platform.machine()}-cp{sys.version_info[0]}{sys.version_info[1]}"


def install(folder: Path) -> None:
    """Checks the stick and installs from it.

    Raises:
        Refused: the stick has no wheels for this machine, or a file is damaged, or pip fails.
    """
    listed = STICK / "targets" / f"{target_name()}.txt"
    if not listed.is_file():
        there = ", ".join(sorted(path.stem for path in (STICK / "targets").glob("*.txt"))) or "none"
        raise Refused(f"the stick has no wheels for {target_name()}; it has {there}. Start this with another Python.")
    if (folder / ".venv").exists():
        raise Refused(f"{folder.name}/.venv exists already: name another folder, or delete it.")
    check(wheels_of(listed))
    refuse_incomplete(target_name())
    folder.mkdir(parents=True, exist_ok=True)
    copy_new(STICK / "project", folder)
    environment = folder / ".venv"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    clean |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run([sys.executable, "-m", "venv", str(environment)], clean)
    install_wheels(environment, listed, clean)
    (environment / ".installed").touch()  # so that make does not install again


def install_wheels(environment: Path, listed: Path, clean: dict[str, str]) -> None:
    """Installs a target's wheels: with the stick's uv, which takes less time, or with pip where that does not run.

    Raises:
        Refused: pip fails too.
    """
    python = environment / "bin" / "python"
    options = ["--quiet", "--no-index", "--no-deps", "--find-links", str(STICK / "wheels"), "--require-hashes"]
    with tempfile.TemporaryDirectory() as folder:
        uv = unpacked_uv(wheels_of(listed), Path(folder))
        if uv is not None:
            start = [str(uv), "pip", "install", "--offline", "--no-config", "--no-cache", "--python", str(python)]
            quietly = {key: value for key, value in clean.items() if not key.startswith("UV_")}
            try:
                run([*start, *options, "-r", str(listed)], quietly)
                return
            except (Refused, OSError):
                print("uv does not work here; pip installs, which takes some minutes.")
    run([str(python), "-m", "pip", "install", *options, "-r", str(listed)], clean)


def unpacked_uv(wanted: set[str], folder: Path) -> Path | None:
    """Writes the program in the stick's wheel of uv into a folder; None where there is no such wheel among the wanted ones."""
    for wheel in sorted((STICK / "wheels").glob("uv-*.whl")):
        if digest(wheel) not in wanted:
            continue
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".data/scripts/uv")]
            if names:
                (folder / "uv").write_bytes(archive.read(names[0]))
                (folder / "uv").chmod(0o700)
                return folder / "uv"
    return None


def refuse_incomplete(name: str) -> None:
    """Refuses a set of wheels that lacks something, which would fail when it is used.

    Raises:
        Refused: the manifest names what is missing.
    """
    for target in json.loads((STICK / "manifest.json").read_text(encoding="utf-8")):
        if target["name"] == name and target["missing"]:
            raise Refused(f"the stick lacks {target['missing'][0]}.")


def wheels_of(listed: Path) -> set[str]:
    """The checksums of a target's wheels."""
    return {part[14:] for part in listed.read_text(encoding="utf-8").split() if part.startswith("--hash=sha256:")}


def check(wanted: set[str]) -> None:
    """Compares the project's files and the wanted wheels with SHA256SUMS.

    Raises:
        Refused: a file is missing, damaged or not listed.
    """
    lines = (STICK / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: value for value, _, name in (line.partition("  ") for line in lines)}
    used = {name: value for name, value in sums.items() if not name.startswith("wheels/") or value in wanted}
    for name, value in used.items():
        path = STICK / name
        if not path.is_file() or digest(path) != value:
            raise Refused(f"{name} is damaged or missing: copy the stick again.")
    if missing := wanted - set(sums.values()):
        raise Refused(f"{len(missing)} wheels are not on the stick: it was made without --download all.")
    found = (path for path in (STICK / "project").rglob("*") if path.is_file())
    for path in found:
        if path.relative_to(STICK).as_posix() not in sums:
            raise Refused(f"{path.name} does not belong to the stick.")


def digest(path: Path) -> str:
    """A file's SHA-256."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def copy_new(source: Path, folder: Path) -> None:
    """Copies a folder's files; one that is there already stays as it is."""
    for path in sorted(source.rglob("*")):
        to = folder / path.relative_to(source)
        if path.is_dir():
            to.mkdir(parents=True, exist_ok=True)
        elif not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)


def run(command: list[str], environment: dict[str, str]) -> None:
    """Runs a command.

    Raises:
        Refused: it failed.
    """
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
        raise Refused(f"{' '.join(command[1:4])} failed: {said[:300]}")


if __name__ == "__main__":
    sys.exit(main())
