"""All checks, each with its time: style and types, unit tests, notebooks, notebooks in a browser. Ends after the first that fails.

python tests/run_all.py [--only style|unit|notebooks|browser] [--quick | --slow] [--profile tiny|demo]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
WORKERS = max(2, min(8, CORES))
STAGES = ("style", "unit", "notebooks", "browser")
# Each needs what the one before it leaves in the run; every other notebook makes what it needs and can run beside them.
IN_ORDER = ("04_train", "05_monitor", "06_evaluate", "11_leaving")
PYTEST = [sys.executable, "-m", "pytest"]
OFFLINE = {"HF_HUB_OFFLINE": "1"}
# Kept between calls, so that what is compiled once need not be compiled again.
COMPILED = {"TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "torchinductor")}


@dataclass(frozen=True)
class Job:
    """A command and what it adds to the environment."""

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Runs the chosen checks and returns the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=STAGES)
    parser.add_argument("--profile", choices=("tiny", "demo"), default="tiny")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="style, and the unit tests that take no time")
    size.add_argument("--slow", action="store_true", help="what does more with QLORA_SLOW=1, and nothing else")
    options = parser.parse_args()
    chosen = ("style", "unit") if options.quick else ("unit",) if options.slow else STAGES
    for stage in chosen:
        if options.only in (None, stage):
            started = time.monotonic()
            code = run(jobs(stage, options))
            print(f"== {stage} took {time.monotonic() - started:.0f} s\n", flush=True)
            if code:
                return code
    return 0


def jobs(stage: str, options: argparse.Namespace) -> list[Job]:
    """What a stage runs, side by side where it is several commands."""
    if stage == "style":
        return style_jobs()
    if stage == "unit":
        # Tests of a file that makes a fixture once for all stay in one process (groups.py).
        spread = ["-n", str(WORKERS), "--dist", "loadgroup", "--no-loadscope-reorder"]
        command = [*PYTEST, "tests", *spread, "--ignore=tests/browser", "--durations=15"]
        command += ["--quick"] if options.quick else ["-m", "slow or only_slow"] if options.slow else []
        slow = {"QLORA_SLOW": "1"} if options.slow else {}
        return [Job("unit", command, OFFLINE | COMPILED | slow | {"OMP_NUM_THREADS": "1"})]
    if stage == "notebooks":
        return notebook_jobs(options.profile)
    return [Job("browser", [*PYTEST, "tests/browser", "--durations=10"], OFFLINE | COMPILED)]


def style_jobs() -> list[Job]:
    """Lint, format, layers and types."""
    return [
        Job("types", [str(BIN / "mypy")]),
        Job("lint", [str(BIN / "ruff"), "check", "."]),
        Job("format", [str(BIN / "ruff"), "format", "--check", "."]),
        Job("layers", [str(BIN / "lint-imports"), "--no-cache"]),
    ]


def notebook_jobs(profile: str) -> list[Job]:
    """The notebooks, each job with runs and caches of its own. In the demo profile one after another, as they are stored."""
    chains = notebook_chains(sorted((ROOT / "notebooks").glob("*.ipynb")), in_order=profile == "demo")
    scratch = Path(tempfile.mkdtemp(prefix="qlora-tests-"))
    found = []
    for chain in chains:
        own = scratch / chain[0].stem
        environment = OFFLINE | {
            "QLORA_PROFILE": profile,
            "QLORA_RUNS": str(own / "runs"),
            "JUPYTER_DATA_DIR": str(own / "jupyter"),
            "QLORA_LEARNER": str(own / "learner"),
            "QLORA_BOARD": "",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if profile == "tiny":
            environment |= COMPILED | {"QLORA_CACHE": str(own / "cache"), "OMP_NUM_THREADS": "1"}
        names = [str(path.relative_to(ROOT)) for path in chain]
        command = [*PYTEST, "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", *names]
        found.append(Job(", ".join(path.stem for path in chain), command, environment))
    return found


def notebook_chains(paths: Sequence[Path], *, in_order: bool) -> list[list[Path]]:
    """Which notebooks run one after another; the chains themselves run side by side."""
    if in_order:
        return [list(paths)]
    first = [path for path in paths if path.stem in IN_ORDER]
    return [*([first] if first else []), *([path] for path in paths if path.stem not in IN_ORDER)]


def run(jobs: Sequence[Job]) -> int:
    """Runs jobs, several of them side by side with each one's output shown when it ends; the first exit code that is not 0."""
    if len(jobs) == 1:
        print(f"== {' '.join(map(_shown, jobs[0].command))}", flush=True)
        return subprocess.run(jobs[0].command, cwd=ROOT, env=os.environ | jobs[0].environment).returncode
    with ThreadPoolExecutor(WORKERS) as pool:
        return next((code for code in list(pool.map(_captured, jobs)) if code), 0)


def _captured(job: Job) -> int:
    started = time.monotonic()
    done = subprocess.run(
        job.command,
        cwd=ROOT,
        env=os.environ | job.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    print(f"== {job.name}: {time.monotonic() - started:.0f} s\n{done.stdout}", flush=True)
    return done.returncode


def _shown(part: str) -> str:
    return Path(part).name if part.startswith(str(BIN)) else part


if __name__ == "__main__":
    sys.exit(main())
