"""Takes families down the whole path, one process each, and writes what was found.

    .venv/bin/python tests/matrix/measure.py [--plans] [--write] [--out FILE.jsonl] [--workers N] [FAMILY ...]

A parent imports torch, transformers and peft once, on one thread, and forks a child for each family. `--write` keeps the results
in `benchmarks/matrix_two_cores.json`, of which `docs/models.md` is made; families that are not named stay as they are there.
`--plans` goes no further than loading: what the plan says of each `config.json` is compared with the loaded model, and of the
record that part alone is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "matrix_two_cores.json"
LIMIT_S = 300
ADDRESS_SPACE_GIB = 24
PLANS = ("build", "load")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def main() -> int:
    """Judges the families that are named, or all; returns 0 whatever was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--plans", action="store_true", help="compare the plans alone")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/")
    parser.add_argument("--out", type=Path, help="write a line of JSON for each family, as soon as it is judged")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import_once()
    from matrix_configurations import judged_families

    with tempfile.TemporaryDirectory(prefix="qlora-matrix-") as scratch:
        os.environ["QLORA_CACHE"] = f"{scratch}/cache"
        families = options.families or judged_families()
        for found in judged(families, Path(scratch), options.workers, PLANS if options.plans else None):
            print(planned(found) if options.plans else sentence(found), flush=True)
            if options.out:
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
            if options.write:
                write_plan(found) if options.plans else write(found)
    return 0


def import_once() -> None:
    """Imports what every child needs, and silences it. No thread may run yet: a child would wait for its locks for ever."""
    warnings.filterwarnings("ignore")
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import matrix_path  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

    from qlora_helpers import workflow  # noqa: F401
    from qlora_helpers.model.checkpoints import corpus_tokenizer
    from qlora_helpers.model.loading import load_model  # noqa: F401
    from qlora_helpers.training import train  # noqa: F401

    corpus_tokenizer()


def judged(families: list[str], scratch: Path, workers: int, stages: tuple[str, ...] | None = None) -> Any:
    """Yields what was found of each family, in the order in which they end."""
    waiting, running = list(reversed(families)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            family = waiting.pop()
            running[forked(family, scratch, stages)] = family, time.monotonic()
        for child in list(running):
            family, started = running[child]
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and time.monotonic() - started > LIMIT_S:
                os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0)
            if ended:
                del running[child]
                yield collected(family, scratch, status, time.monotonic() - started)
        time.sleep(0.05)


def forked(family: str, scratch: Path, stages: tuple[str, ...] | None) -> int:
    """Starts a child that judges a family and returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        import resource

        import matrix_path

        limit = ADDRESS_SPACE_GIB * 1024**3
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        log = open(scratch / f"{family}.log", "w")  # noqa: SIM115 - the process ends with it
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        (scratch / family).mkdir()
        result = scratch / f"{family}.json"
        stages = stages or matrix_path.STAGES
        matrix_path.judge(family, scratch / family, lambda found: replaced(result, found) and None, stages)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def replaced(path: Path, found: dict[str, Any]) -> None:
    """Writes JSON whole: the child may be killed at any time."""
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(found), encoding="utf-8")
    aside.rename(path)


def collected(family: str, scratch: Path, status: int, seconds: float) -> dict[str, Any]:
    """What a child left, with how it ended."""
    result = scratch / f"{family}.json"
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"family": family, "reached": None}
    if status:
        log = (scratch / f"{family}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        what = (
            f"took longer than {LIMIT_S} s" if seconds > LIMIT_S else f"ended with {os.waitstatus_to_exitcode(status)}"
        )
        last = f": {log[-1]}" if log else ""
        found["failed"] = {
            "stage": "?",
            "error": "Process",
            "sentence": f"its process {what}{last}"[:500],
            "refused": False,
        }
        found["passed"] = False
    shutil.rmtree(scratch / family, ignore_errors=True)
    return found | {"wall_s": round(seconds, 1), "cpu_s": round(sum(found.get("seconds", {}).values()), 1)}


def sentence(found: dict[str, Any]) -> str:
    """One line on a family."""
    rows = {True: "packed", False: "padded", None: ""}[found.get("packed")]
    if found.get("passed"):
        return f"{found['family']}: passed, {rows}, {found['cpu_s']} s of CPU"
    failed = found["failed"]
    return (
        f"{found['family']}: {failed['stage']} {failed['error']} ({failed.get('place')}) {rows}: {failed['sentence']}"
    )


def planned(found: dict[str, Any]) -> str:
    """One line on a family's plan."""
    plan = found.get("plan", {})
    if "off" in plan:
        return f"{found['family']}: parameters {plan['off']:+.3%}, bytes {plan['bytes_off']:+.3%}"
    return f"{found['family']}: {plan.get('refused') or found['failed']['sentence']}"


def write_plan(found: dict[str, Any]) -> None:
    """Puts a family's plan into the record, beside what was measured of it before."""
    from importlib.metadata import version

    from qlora_helpers.base.files import write_json

    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if found["family"] in record["families"] and "plan" in found:
        record["families"][found["family"]]["plan"] = found["plan"]
        record["plans"] = {
            "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in PACKAGES},
        }
        write_json(RECORD, record)


def write(found: dict[str, Any]) -> None:
    """Puts a family's result into the record, with the versions that it holds for."""
    from importlib.metadata import version

    from qlora_helpers.base.files import write_json

    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    families = record.get("families", {}) | {found["family"]: found}
    plans = {"plans": record["plans"]} if "plans" in record else {}
    write_json(
        RECORD,
        plans
        | {
            "machine": f"{os.cpu_count()} shared CPU cores, no GPU",
            "versions": {name: version(name) for name in PACKAGES},
            "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
            "families": dict(sorted(families.items())),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
