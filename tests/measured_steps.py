"""The steps that one GPU measured (`benchmarks/step_speed_one_gpu.json`), as the README's tables read them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
_spec = importlib.util.spec_from_file_location("benchmark_tables", BENCHMARKS / "readme.py")
_tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tables)
step_of = _tables.step_of
"""A measured case -> the model's sizes and the step's settings."""


def planned_steps() -> list[dict[str, Any]]:
    """Our steps whose recomputed layers are known; the recipe's batches differ in length."""
    return [case for case in _tables.measured_steps() if case.get("layers_checkpointed") is not None]


def name_of(case: dict[str, Any]) -> str:
    """For a test's id."""
    return f"{case['model']}-{case['variant']}-{case['blocks']}"
