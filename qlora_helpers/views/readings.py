"""Numbers out of a run's progress and status, which may come from anywhere: what is no number is left out. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qlora_helpers.base.text import plain
from qlora_helpers.views.charts import Points


def points_of(records: Sequence[dict[str, Any]], key: str) -> Points:
    """Returns `(step, value)` of each record that has a finite number under a key."""
    values = [(record["step"], as_number(record.get(key))) for record in records]
    return tuple((step, value) for step, value in values if value is not None)


def as_number(value: Any) -> float | None:
    """Returns a value as a float if it is a finite number, else None; a damaged file may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not math.isfinite(value):
        return None
    return float(value)


def as_readings(values: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the readings of the GPUs and of the process, empty where they are missing or malformed."""
    gpus, process = values.get("gpus"), values.get("process")
    gpus = [gpu for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    return gpus, process if isinstance(process, dict) else {}


def named_gpus(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns each GPU's reading with what it is called: its number, and its machine where there are several."""
    return _numbered(as_readings(values)[0], "GPU")


def named_processes(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the reading of each process with what it is called; none where one process trains alone."""
    found = values.get("processes")
    return _numbered([each for each in found if isinstance(each, dict)] if isinstance(found, list) else [], "process")


def _numbered(readings: list[dict[str, Any]], kind: str) -> list[tuple[str, dict[str, Any]]]:
    hosts = [plain(str(each["host"]))[:40] if "host" in each else "" for each in readings]
    several = len(set(hosts)) > 1
    return [
        (f"{host} {kind} {hosts[:index].count(host)}" if several else f"{kind} {index}", each)
        for index, (host, each) in enumerate(zip(hosts, readings, strict=True))
    ]


def use_of(record: dict[str, Any]) -> dict[str, float]:
    """Returns `memory_gib` of the fullest GPU and `load_percent` of the least busy one, else those of the process."""
    gpus, process = as_readings(record)
    memory = [value for gpu in gpus if (value := as_number(gpu.get("memory_used_gib"))) is not None]
    load = [value for gpu in gpus if (value := as_number(gpu.get("load"))) is not None]
    found = {"memory_gib": max(memory, default=None), "load_percent": min(load, default=None)}
    if not gpus:
        found = {"memory_gib": as_number(process.get("rss_gib")), "load_percent": as_number(process.get("cpu_percent"))}
    return {key: value for key, value in found.items() if value is not None}
