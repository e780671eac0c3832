"""How a step's time grows with the data, the length of a block, the micro-batch and the model: one thing at a time.

    python benchmarks/growth.py OUT.json [--models A B ...] [--seq-len 512 1024 ...] [--blocks 4 8 ...] [--rows 500 1000 ...]

The first value of each list is the starting point; each list is walked with the others at their start. Steps are measured as
`step_speed.py` does, with the fast step uncompiled, so that no case waits for a compiler; what it took to prepare the rows stands
beside them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from step_speed import Case, machine, measure

SETTINGS = ("model", "seq_len_tokens", "blocks", "rows")


def walked(starts: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The starting point, then every other value of each setting with the rest at their start."""
    first = {name: values[0] for name, values in starts.items()}
    return [first] + [first | {name: value} for name, values in starts.items() for value in values[1:]]


def main() -> None:
    """Measures each point and writes after each."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("out", type=Path)
    options.add_argument("--models", nargs="+", default=["smollm2-135m", "falcon-7b"])
    options.add_argument("--seq-len", nargs="+", type=int, default=[512, 1024, 2048])
    options.add_argument("--blocks", nargs="+", type=int, default=[4, 8, 16])
    options.add_argument("--rows", nargs="+", type=int, default=[500, 1000, 2000])
    options.add_argument("--data", default="embedded", help="a data file; else the embedded corpus")
    chosen = options.parse_args()
    lists = dict(zip(SETTINGS, (chosen.models, chosen.seq_len, chosen.blocks, chosen.rows), strict=True))
    results: dict[str, Any] = machine() | {"data": Path(chosen.data).stem, "points": []}
    for point in walked(lists):
        started = time.monotonic()
        case = Case(point["model"], "eager", point["blocks"], checkpointed=0)
        found = measure(case, chosen.data, point["seq_len_tokens"], False, rows=point["rows"])
        kept = ("step_s", "tokens_per_s", "prepared_s", "peak_allocated_gib")
        line = point | {name: found[name] for name in kept if name in found}
        results["points"].append(line | {"seconds_in_all": round(time.monotonic() - started, 1)})
        print(json.dumps(results["points"][-1]), flush=True)
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
