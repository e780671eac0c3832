"""All checks in order, each with its time: style, layers, unit tests, notebooks. Ends at the first failure.

python tests/run_all.py [--only style|unit|notebooks] [--profile tiny|demo]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def main() -> int:
    """Runs the chosen checks and returns the first exit code that is not 0."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--only", choices=("style", "unit", "notebooks"))
    arguments.add_argument("--profile", choices=("tiny", "demo"), default="tiny")
    options = arguments.parse_args()
    for name, command, environment in checks(options.profile):
        if options.only in (None, name):
            started = time.monotonic()
            print(f"== {name}: {' '.join(Path(command[0]).name if i == 0 else part for i, part in enumerate(command))}")
            sys.stdout.flush()
            code = subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode
            print(f"== {name} took {time.monotonic() - started:.0f} s\n", flush=True)
            if code:
                return code
    return 0


def checks(profile: str) -> list[tuple[str, list[str], dict[str, str]]]:
    """Name, command and environment of each check; notebooks run in order, on runs of their own."""
    scratch = tempfile.mkdtemp(prefix="qlora-tests-")
    python = [sys.executable, "-m"]
    offline = {"HF_HUB_OFFLINE": "1"}
    notebook_environment = offline | {
        "QLORA_PROFILE": profile,
        "QLORA_RUNS": f"{scratch}/runs",
        "JUPYTER_DATA_DIR": f"{scratch}/jupyter",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if profile == "tiny":
        notebook_environment |= {"QLORA_CACHE": f"{scratch}/cache", "OMP_NUM_THREADS": "2"}
    return [
        ("style", [str(BIN / "ruff"), "check", "."], {}),
        ("style", [str(BIN / "ruff"), "format", "--check", "."], {}),
        ("style", [str(BIN / "lint-imports"), "--no-cache"], {}),
        ("unit", [*python, "pytest", "tests", "-n", "2", "--dist", "loadfile"], offline | {"OMP_NUM_THREADS": "1"}),
        ("notebooks", [*python, "pytest", "--nbval-lax", "--nbval-current-env", "notebooks"], notebook_environment),
    ]


if __name__ == "__main__":
    sys.exit(main())
