"""Fits the constants of `qlora_helpers.speed` to the measured steps, and says how far each step is off.

    .venv/bin/python benchmarks/fit_speed.py [--write]

Reads `step_speed_one_gpu.json`; with `--write` puts what it found into `fit_speed.json`. A hill climb with a fixed seed over eight
constants, kept within what a GPU can be. It sees the steps of three models alone; what the others were measured at says how far the
constants carry.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path

from readme import CALIBRATED, measured_steps, step_of

from qlora_helpers.catalog import GPUS
from qlora_helpers.speed import FITTED, Speed, step_seconds

HERE = Path(__file__).parent
ROUNDS = 20_000
BOUNDS = {
    "matrix_share": (0.55, 0.78), "memory_share": (0.4, 0.9), "forward_passes": (0.5, 12), "backward_passes": (0.5, 20),
    "eager_factor": (1, 3), "forward_host_s": (0, 0.008), "backward_host_s": (0, 0.016),
    "eager_host_factor": (1, 2),
}  # fmt: skip
START = Speed(0.72, 0.65, 2.5, 4.0, 1.9, 0.003, 0.006, 1.2)
LIKELY_MEMORY_SHARE = 0.65  # what large copies reach; holds the constants apart that these few steps can't


def main() -> None:
    """Fits, prints and, where asked, writes."""
    cases = [case for case in measured_steps() if case.get("layers_recomputed") is not None]
    steps = [(*step_of(case), case["step_s"]) for case in cases]
    seen = [step for case, step in zip(cases, steps, strict=True) if case["model"] in CALIBRATED]

    def error(speed: Speed) -> float:
        logs = (
            math.log(step_seconds(sizes, step, GPUS["H100"], speed) / seconds) ** 2 for sizes, step, seconds in seen
        )
        return sum(logs) + 0.01 * (speed.memory_share - LIKELY_MEMORY_SHARE) ** 2

    draw, best = random.Random(0), START
    least = error(best)
    for number in range(ROUNDS):
        spread = 0.3 * (1 - number / ROUNDS) + 0.01
        changed = {
            name: min(high, max(low, getattr(best, name) * (1 + draw.gauss(0, spread))))
            for name, (low, high) in BOUNDS.items()
        }
        if (found := error(Speed(**changed))) < least:
            best, least = Speed(**changed), found
    result = {
        "fitted": {name: float(f"{value:.3g}") for name, value in dataclasses.asdict(best).items()},
        "in_use": dataclasses.asdict(FITTED),
        "steps": [
            {
                "model": case["model"], "blocks": case["blocks"], "recomputed": step.recomputed, "compiled": case["compiled"],
                "held_out": case["model"] not in CALIBRATED, "measured_s": seconds,
                "in_use_s": round(step_seconds(sizes, step, GPUS["H100"]), 4),
            }
            for case, (sizes, step, seconds) in zip(cases, steps, strict=True)
        ],
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if "--write" in sys.argv[1:]:
        (HERE / "fit_speed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
