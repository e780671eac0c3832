"""Writes requirements.lock, -dev.lock and -book.lock with uv: every package, pinned, with hashes, for all platforms and Pythons.

python tools/lock.py

torch and the CUDA packages that it brings are left out, since its builds differ by machine: `tools/install.py` installs torch
after the lock, by its pin in requirements.txt. At the end the oldest versions that pyproject.toml allows are resolved together, so
that no range promises what can't be installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = "3.11"
# torch's own CUDA packages; nvidia-ml-py is ours.
OF_TORCH = re.compile(r"(torch|triton|cuda-.*|nvidia-(?!ml-py).*)==")
HEADER = "# Written by `make lock` from {source}; don't edit.{beside}\n"
BESIDE = " torch is installed beside it (tools/install.py)."


def main() -> int:
    """Writes the files; the second holds only what the first does not, the book's is an environment of its own."""
    runtime = resolve("requirements.txt")
    development = resolve("requirements-dev.txt", constraints=runtime)
    names = {name_of(block) for block in runtime}
    write("requirements-book.lock", "requirements-book.txt", resolve("requirements-book.txt"))
    write("requirements.lock", "requirements.txt", runtime)
    write("requirements-dev.lock", "requirements-dev.txt", [each for each in development if name_of(each) not in names])
    print(f"the oldest versions of pyproject.toml's ranges fit together: {', '.join(oldest_versions())}")
    return 0


def oldest_versions() -> list[str]:
    """Resolves the lower bounds of all ranges together, and returns what that gives of torch, transformers and the hub's client."""
    command = [
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
        "--python-version",
        OLDEST_PYTHON,
        "--resolution",
        "lowest-direct",
    ]
    command += ["--no-header", "--no-annotate", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return re.findall(r"^(?:torch|transformers|huggingface-hub)==\S+", done.stdout, flags=re.MULTILINE)


def resolve(source: str, constraints: list[str] | None = None) -> list[str]:
    """The packages that a requirements file leads to, each as its pin with the hashes below, without torch."""
    command = ["uv", "pip", "compile", source, "--universal", "--python-version", OLDEST_PYTHON]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet"]
    if constraints:
        command += ["--constraints", "-"]
    done = subprocess.run(
        command, cwd=ROOT, input="".join(constraints or ()), stdout=subprocess.PIPE, text=True, check=True
    )
    blocks = re.split(r"^(?=[\w])", done.stdout, flags=re.MULTILINE)
    return [block for block in blocks if re.match(r"\w", block) and not OF_TORCH.match(block)]


def name_of(block: str) -> str:
    """The package's name."""
    return block.split("==")[0]


def write(name: str, source: str, blocks: list[str]) -> None:
    """Writes a lock file."""
    (ROOT / name).write_text(
        HEADER.format(source=source, beside="" if "book" in source else BESIDE) + "".join(blocks), encoding="utf-8"
    )
    print(f"{name}: {len(blocks)} packages")


if __name__ == "__main__":
    sys.exit(main())
