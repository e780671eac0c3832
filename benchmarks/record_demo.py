"""Records what `make demo` measured, from its run folders, as `benchmarks/demo_two_cores.json`.

    make demo && make demo DATA=dialogues.jsonl
    .venv/bin/python benchmarks/record_demo.py runs/demo runs/demo-dialogues

Of a file of somebody's own nothing but its name, sizes and scores is recorded, no text.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.machine.telemetry import cpu_cores
from qlora_helpers.runs.folder import Run

OUT = Path(__file__).parent / "demo_two_cores.json"


def main() -> None:
    """Writes the record of the runs named on the command line."""
    runs = [record(Run(Path(name).resolve())) for name in sys.argv[1:]]
    write_json(OUT, {"machine": {"cpu": cpu_name(), "cores": cpu_cores(), "system": platform.system()}, "runs": runs})


def record(run: Run) -> dict[str, Any]:
    """One run: what was asked, what it took and what came out."""
    config, evaluation, plan = run.config(), read_json(run.evaluation_path), read_json(run.plan_path)
    prepared = read_json(run.data_dir / "prepared.json")
    losses = [line for line in run.progress() if "eval_loss" in line]
    return {
        "name": run.name,
        "data": prepared["source"],
        "train_rows": prepared["report"]["rows"],
        "train_tokens": prepared["report"]["tokens"],
        "test_rows": len(evaluation["rows"]),
        "model": config.model.name,
        "scores": evaluation["scores"],
        "rouge_l_gain": evaluation["rouge_l_gain"],
        "eval_loss": losses[-1]["eval_loss"] if losses else None,
        "demo_seconds": plan["demo_seconds"],
        "measured": plan["measured"],
        "reload": plan["reload"],
    }


def cpu_name() -> str:
    """The processor's model."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
