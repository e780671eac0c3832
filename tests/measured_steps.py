"""The steps that one GPU measured (`benchmarks/step_speed_one_gpu.json`), as the tables in docs/ read them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from records import measured_steps, step_of

__all__ = ["name_of", "planned_steps", "step_of"]


def planned_steps() -> list[dict[str, Any]]:
    """Our steps whose number of checkpointed layers is known; the recipe's batches differ in length."""
    return [case for case in measured_steps() if case.get("layers_checkpointed") is not None]


def name_of(case: dict[str, Any]) -> str:
    """For a test's id."""
    return f"{case['model']}-{case['variant']}-{case['blocks']}"
