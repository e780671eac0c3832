"""What is imported is declared, what is declared is pinned, and what is pinned is locked."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from qlora_helpers.base.config import TRACKERS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = {canonicalize_name(each.name): each for each in map(Requirement, PROJECT["dependencies"])}
EXTRAS = {
    canonicalize_name(each.name): each for each in map(Requirement, sum(PROJECT["optional-dependencies"].values(), []))
}
TEST_TOOLS = {"nbval", "pytest", "pytest-xdist", "hypothesis", "moto", "playwright", "ruff", "mypy", "import-linter"}
LOCKS = ("requirements.lock", "requirements-dev.lock")


def pins(name: str) -> dict[str, Requirement]:
    """The pinned packages of a requirements file."""
    lines = [line.split(" #")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(each.name): each for each in found}


def locked(name: str) -> dict[str, str]:
    """The packages of a lock file by name, each with its text: pins, markers and hashes."""
    blocks = re.split(r"^(?=\w)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    texts: dict[str, str] = {}
    for block in blocks:
        key = canonicalize_name(block.split("==")[0])
        texts[key] = texts.get(key, "") + block
    return texts


def imported(folder: Path) -> set[str]:
    """Top-level names of all imports below a folder, those inside functions and `import_module("...")` too."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
                names |= {each.value for each in node.args[:1] if isinstance(each, ast.Constant)}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"qlora_helpers"}


# What the wheel of the oldest transformers of the range requires of packages that are declared here, too
OLDEST_TRANSFORMERS = "5.17.0"
OF_OLDEST_TRANSFORMERS = (
    *("huggingface-hub<2.0,>=1.5.0", "numpy>=1.17", "regex>=2025.10.22", "safetensors>=0.8.0"),
    *("tokenizers<0.24.0,>=0.23.1", "tqdm>=4.60"),
)
OPTIONAL = {
    canonicalize_name(Requirement(each).name) for extra in PROJECT["optional-dependencies"].values() for each in extra
}


def test_every_imported_package_is_declared():
    homes = dict(importlib.metadata.packages_distributions())
    names = imported(ROOT / "qlora_helpers")
    assert len(names) >= 25 and {"numpy", "filelock", "IPython", "botocore"} <= names
    assert set(TRACKERS) <= names  # a person's own choice: `runs.trackers` says what is missing
    names -= set(TRACKERS)
    homes["triton"] = ["torch"]  # comes with the CUDA build alone; a fallback stands beside each kernel
    homes["llama_cpp"] = ["llama-cpp-python"]  # asked for by name, and refused with the command that installs it
    homes["lm_eval"] = ["lm-eval"]  # installed on demand
    declared = set(DECLARED) | OPTIONAL
    undeclared = {name for name in names if not {canonicalize_name(home) for home in homes[name]} & declared}
    assert not undeclared


def test_the_pins_are_of_what_is_declared_and_lie_in_its_ranges():
    pinned = pins("requirements.txt")
    assert set(pinned) == set(DECLARED) and len(pinned) >= 30
    for name, requirement in pinned.items():
        (exactly,) = requirement.specifier
        assert exactly.operator == "==" and DECLARED[name].specifier.contains(exactly.version), name
        assert DECLARED[name].specifier, f"{name} has no range"


def oldest(requirement: Requirement) -> str:
    """The lower bound of a range."""
    return next(each.version for each in requirement.specifier if each.operator in (">=", "=="))


def share_a_version(one: Requirement, other: Requirement) -> bool:
    """Whether a lower bound of two ranges lies in both: then what is installed can fit both."""
    bounds = [each.version for each in (*one.specifier, *other.specifier) if each.operator in (">=", "==", "~=")]
    return not bounds or any((one.specifier & other.specifier).contains(bound) for bound in bounds)


def test_the_ranges_can_be_installed_with_the_oldest_transformers_and_with_what_is_installed_here():
    """`make lock` resolves all lower bounds together, with a network."""
    assert Version(oldest(DECLARED["transformers"])) == Version(OLDEST_TRANSFORMERS)
    needed = [("transformers", Requirement(each)) for each in OF_OLDEST_TRANSFORMERS]
    for name in set(DECLARED) & {canonicalize_name(each.name) for each in importlib.metadata.distributions()}:
        needed += [
            (name, each) for each in map(Requirement, importlib.metadata.requires(name) or ()) if not each.marker
        ]
    found = [(name, each, DECLARED.get(canonicalize_name(each.name))) for name, each in needed]
    ours = [(name, each, own) for name, each, own in found if own]
    assert len(ours) >= 30
    assert not [f"{name} needs {each}, we {own}" for name, each, own in ours if not share_a_version(each, own)]


def test_extras_are_tested_in_a_version_of_their_range():
    pinned = pins("requirements-dev.txt")
    assert EXTRAS and not set(EXTRAS) & set(DECLARED)
    for name, requirement in EXTRAS.items():
        if name in ("lm-eval", "llama-cpp-python"):  # many packages, a long build: tried apart
            continue
        (exactly,) = pinned[name].specifier
        assert exactly.operator == "==" and requirement.specifier.contains(exactly.version), name


def test_test_tools_are_no_run_time_requirement():
    assert not TEST_TOOLS & set(DECLARED)
    assert set(pins("requirements-dev.txt")) >= TEST_TOOLS
    assert "nbval==" in (ROOT / "environment.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("lock", [*LOCKS, "requirements-book.lock"])
def test_the_lock_pins_what_the_requirements_pin_and_hashes_everything(lock):
    packages = locked(lock)
    wanted = pins(lock.replace(".lock", ".txt"))
    wanted.pop("torch", None)
    assert wanted and set(wanted) <= set(packages)
    for name, requirement in wanted.items():
        assert f"=={next(iter(requirement.specifier)).version} " in packages[name].replace("\\", " "), name
    assert all("--hash=sha256:" in text for text in packages.values())


def test_torch_and_its_cuda_packages_stand_outside_the_hashes():
    names = {name for lock in LOCKS for name in locked(lock)}
    assert [name for name in names if re.match(r"torch$|triton|cuda-|nvidia-(?!ml-py)", name)] == []
    assert {"nvidia-ml-py", "sympy", "networkx", "setuptools"} <= names  # torch's other requirements are there


def test_the_locks_hold_no_package_twice_and_name_no_host():
    assert not set(locked(LOCKS[0])) & set(locked(LOCKS[1]))
    for name in (
        *LOCKS,
        "requirements-book.lock",
        "requirements-book.txt",
        "requirements.txt",
        "requirements-dev.txt",
        "environment.yml",
        "pyproject.toml",
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "://" not in text and "index-url" not in text and "find-links" not in text, name
