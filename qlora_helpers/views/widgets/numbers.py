"""Boxes to type numbers into, with a slider where a setting's range is known; what is not a number is refused, never guessed.

A browser's own number box drops what it can't read: `8.7` for a whole number became 87. These boxes hold text, which is read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets

from qlora_helpers.views.widgets.panel import add_classes

STOPS: dict[str, tuple[int, ...]] = {
    "adapter.r": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "adapter.lora_alpha": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "data.seq_len_tokens": (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192),
    "train.micro_batch_size": (1, 2, 4, 8, 16, 32, 64),
    "train.gradient_accumulation_steps": (1, 2, 4, 8, 16, 32, 64),
}
"""The stops of a slider for whole numbers in a wide range; any other number can be typed."""
LOGARITHMIC = ("train.learning_rate",)
START: dict[str, int | float] = {
    "data.train_rows": 100,
    "train.max_steps": 100,
    "train.eval_steps": 10,
    "train.save_steps": 10,
    "model.max_memory_per_gpu_gib": 20.0,
}
"""Where an automatic setting starts when a person switches automatic off; otherwise it starts at the smallest number allowed."""
LONGEST = 40  # characters of a number
_WHOLE = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
Kind = type[int] | type[float]


def read(typed: str, kind: Kind) -> int | float:
    """Returns a number that was typed.

    Raises:
        ValueError: it is not a number, or not a whole one where that is needed.
    """
    typed = typed.strip()
    if len(typed) <= LONGEST:
        if kind is int and _WHOLE.fullmatch(typed):
            return int(typed)
        if kind is float and _NUMBER.fullmatch(typed) and math.isfinite(float(typed)):
            return float(typed)
    wanted = "a whole number, such as 16" if kind is int else "a number, such as 0.05 or 2e-4"
    raise ValueError(f"expected {wanted}, got {typed[:LONGEST]!r}")


def text(value: float) -> str:
    """Returns a number as a person would type it; `read` gives the same number back."""
    short = f"{value:g}"
    return short if isinstance(value, float) and float(short) == value else repr(value)


def control(
    name: str, kind: Kind, row: dict[str, Any], label: dict[str, Any]
) -> tuple[ipywidgets.Widget, list[ipywidgets.Widget]]:
    """Returns the box that holds a setting's number, and all widgets of its line.

    Args:
        name: `section.key`.
        kind: `int` or `float`.
        row: a row of `config.describe`: value, low, high.
        label: `description` and `style` of the box.
    """
    low, high = row["low"], row["high"]
    start = row["value"] if row["value"] is not None else START.get(name, low or 0)
    if name in STOPS:
        return _with_slider(kind, start, STOPS[name], label)
    if name in LOGARITHMIC:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        stops = [digit * 10.0**power for power in range(first, last) for digit in (1, 1.5, 2, 3, 5, 7)] + [10.0**last]
        return _with_slider(kind, start, [float(f"{stop:.2g}") for stop in stops], label)
    if kind is float and low is not None and high is not None and high <= 10:
        return _with_slider(
            kind, start, [round(low + step / 100, 2) for step in range(round(100 * (high - low)) + 1)], label
        )
    if kind is int and high is not None and high <= 100:
        return _with_slider(kind, start, range(int(low), int(high) + 1), label)
    box = _box(start, label)
    return box, [box]


def _box(start: float, label: dict[str, Any]) -> ipywidgets.Text:
    layout = {"width": "110px", "flex": "0 0 auto", "overflow": "visible"}
    return add_classes(ipywidgets.Text(text(start), continuous_update=False, **label, layout=layout), "qlora-number")


def _with_slider(
    kind: Kind, start: float, stops: Sequence[float], label: dict[str, Any]
) -> tuple[ipywidgets.Widget, list[ipywidgets.Widget]]:
    """Returns a number to type, and that number with a slider that moves from one round number to the next."""
    number = _box(start, label)
    slider = ipywidgets.IntSlider(max=len(stops) - 1, readout=False, layout={"flex": "1 1 auto", "width": "auto"})
    quiet = False
    distance = _distance(stops)

    def on_number(change: dict[str, Any]) -> None:
        nonlocal quiet
        try:
            value = read(change["new"], kind)
        except ValueError:
            return
        quiet = True
        slider.value = min(range(len(stops)), key=lambda index: distance(stops[index], value))
        quiet = False

    def on_slider(change: dict[str, Any]) -> None:
        if not quiet:
            number.value = text(stops[change["new"]])

    number.observe(on_number, names="value")
    slider.observe(on_slider, names="value")
    number.observe(lambda change: setattr(slider, "disabled", change["new"]), names="disabled")
    on_number({"new": number.value})
    return number, [number, slider]


def _distance(stops: Sequence[float]) -> Callable[[float, float], float]:
    if stops[0] <= 0 or stops[-1] / stops[0] <= 30:
        return lambda stop, value: abs(stop - value)
    return lambda stop, value: abs(math.log(stop) - math.log(max(1e-12, value)))
