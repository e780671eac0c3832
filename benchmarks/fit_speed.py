"""Fits the constants of `qlora_helpers.planning.speed` to the measured steps, and says how far each step is off.

    .venv/bin/python benchmarks/fit_speed.py [--write]

Reads `step_speed_one_gpu.json`; with `--write` puts what it found into `fit_speed.json`. What unpacking 4-bit weights reaches of
the bandwidth and what attention takes come from kernels that were timed there (`profile`); the rest is found by hill climbs with
fixed seeds, kept within what a GPU can be. They see the steps of three models alone; what the others were measured at says how far
the constants carry.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
import sys
from pathlib import Path

from records import CALIBRATED, measured_steps, step_of

from qlora_helpers.machine.hardware import GPUS
from qlora_helpers.planning.speed import FITTED, Speed, step_seconds

HERE = Path(__file__).parent
ROUNDS, CLIMBS = 6_000, 4
BOUNDS = {
    "matrix_share": (0.5, 0.85),
    "forward_passes": (0.5, 12),
    "backward_passes": (0.5, 20),
    "eager_factor": (1, 3),
    "forward_host_s": (0, 0.008),
    "backward_host_s": (0, 0.016),
    "eager_host_factor": (1, 2),
    "gaps_s": (0, 0.0004),
}
START = Speed(0.72, 0.55, 1.6e6, 2.5e4, 3.0, 6.0, 2.0, 0.003, 0.006, 1.2, 0.0002)
H100 = GPUS["H100"]


def timed_kernels(cases: list[dict]) -> dict[str, float]:
    """The constants that kernels tell: bandwidth of dequantisation, attention's time a head and a value of it."""
    shares, points = [], []
    for case in cases:
        if "profile" not in case:
            continue
        (sizes, step), ms = step_of(case), case["profile"]["ms_by_kind"]
        passes = 2 * sizes.layers + step.checkpointed
        dequantised = passes * sizes.linear_parameters_per_layer * 2.5 / (ms["dequantisation"] / 1000)
        shares.append(dequantised / (H100.bandwidth_gb_s * 1e9))
        tokens = step.tokens * sizes.layers * sizes.heads
        points.append((sizes.head_dim, ms["attention"] / 1000 / tokens * H100.bf16_tflops * 1e12))
    slope, start = statistics.linear_regression(*zip(*points, strict=True))
    return {"memory_share": statistics.median(shares), "head_operations": start, "value_operations": slope}


def main() -> None:
    """Fits, prints and, where asked, writes."""
    cases = [case for case in measured_steps() if case.get("layers_checkpointed") is not None]
    steps = [(*step_of(case), case["step_s"]) for case in cases]
    seen = [step for case, step in zip(cases, steps, strict=True) if case["model"] in CALIBRATED]

    def error(speed: Speed) -> float:
        return sum(math.log(step_seconds(sizes, step, H100, speed) / seconds) ** 2 for sizes, step, seconds in seen)

    def climbed(seed: int) -> Speed:
        draw, best = random.Random(seed), dataclasses.replace(START, **timed_kernels(cases))
        least = error(best)
        for number in range(ROUNDS):
            spread = 0.3 * (1 - number / ROUNDS) + 0.01
            changed = {
                name: min(high, max(low, getattr(best, name) * (1 + draw.gauss(0, spread))))
                for name, (low, high) in BOUNDS.items()
            }
            if (found := error(dataclasses.replace(best, **changed))) < least:
                best, least = dataclasses.replace(best, **changed), found
        return best

    best = min(map(climbed, range(CLIMBS)), key=error)
    result = {
        "fitted": {name: float(f"{value:.3g}") for name, value in dataclasses.asdict(best).items()},
        "in_use": dataclasses.asdict(FITTED),
        "steps": [
            {
                "model": case["model"],
                "blocks": case["blocks"],
                "checkpointed": step.checkpointed,
                "compiled": case["compiled"],
                "captured": step.captured,
                "held_out": case["model"] not in CALIBRATED,
                "measured_s": seconds,
                "in_use_s": round(step_seconds(sizes, step, H100), 4),
            }
            for case, (sizes, step, seconds) in zip(cases, steps, strict=True)
        ],
    }
    print(json.dumps(result, indent=2))
    if "--write" in sys.argv[1:]:
        (HERE / "fit_speed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
