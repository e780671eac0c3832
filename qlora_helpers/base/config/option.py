"""A setting's field: its default, its text and its limits."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any


def option(
    default: Any,
    text: str,
    *,
    choices: tuple | None = None,
    low: float | None = None,
    high: float | None = None,
    many_lines: bool = False,
) -> Any:
    """Makes a dataclass field with its help text and limits.

    Args:
        default: the value if none is given.
        text: a sentence that says what the setting does, with its unit.
        choices: the allowed values, or None.
        low: the smallest allowed number, or None.
        high: the largest allowed number, or None.
        many_lines: whether a text may hold line breaks and tabs; the command line writes them as \\n and \\t.
    """
    limits = {"choices": choices, "low": low, "high": high, "many_lines": many_lines}
    return field(default=default, metadata={"text": text, **limits})


def describe(section: type | Any) -> list[dict[str, Any]]:
    """Describes a section's fields, each as `name`, `value` (the default, or the instance's), `text`, `choices`, `low`, `high`."""
    instance = section() if isinstance(section, type) else section
    return [
        {"name": item.name, "value": getattr(instance, item.name), **item.metadata}
        for item in dataclasses.fields(instance)
    ]
