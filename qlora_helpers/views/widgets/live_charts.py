"""Charts that grow while a run trains. bqplot draws them in the browser, and only changes are sent there.

`charts` draws the same curves as still pictures in the same colours.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import bqplot
import ipywidgets
import numpy as np

from qlora_helpers.views.charts import BLUE, ORANGE, Points, number_text

MOST_POINTS = 500
COLOURS = (BLUE, ORANGE)


class LiveChart:
    """One chart with one or two lines over the optimizer steps.

    Args:
        names: the names of the lines, as the key shows them.
        height_px: the height of the drawing.

    Attributes:
        box: the widget to show.
        lines: bqplot's marks in the order of the names.
        key: the names with their latest values.
    """

    def __init__(self, names: Sequence[str], *, height_px: int) -> None:
        self.names = tuple(names)
        self.x, self.y = bqplot.LinearScale(min=0.0, max=10.0), bqplot.LinearScale()
        looks: tuple[dict[str, Any], ...] = (
            {"colors": [BLUE]},
            {"colors": [ORANGE], "marker": "circle", "marker_size": 24},
        )
        self.lines = [
            bqplot.Lines(x=[], y=[], scales={"x": self.x, "y": self.y}, stroke_width=1.8, **look)
            for _, look in zip(names, looks, strict=False)
        ]
        self.across = bqplot.Axis(scale=self.x, grid_lines="none")
        self.up = bqplot.Axis(scale=self.y, side="left", grid_lines="none")
        self._most = max(3, height_px // 45)
        figure = bqplot.Figure(
            marks=self.lines,
            axes=[self.across, self.up],
            fig_margin={"top": 6, "bottom": 24, "left": 50, "right": 12},
            min_aspect_ratio=0.1,
            max_aspect_ratio=100,
            padding_x=0,
            padding_y=0,
            animation_duration=0,
            layout={"width": "100%", "height": f"{height_px}px", "min_width": "0"},
        )
        self.key = ipywidgets.HTML()
        self.box = ipywidgets.VBox([self.key, figure], layout={"width": "100%", "overflow": "hidden"})
        self.box.add_class("qlora-chart")
        self._drawn: list[tuple[int, float] | None] = []
        self._generation = -1

    def show(self, lines: Sequence[Points], *, last_step: int, generation: int = 0) -> None:
        """Draws what is new, and sends nothing if nothing is.

        Args:
            lines: the points of each line in the order of the names.
            last_step: the last step of the whole run; the axis grows towards it.
            generation: a count; when it changes, points may have been taken back.
        """
        ends = [points[-1] if points else None for points in lines]
        if ends == self._drawn and generation == self._generation:
            return
        self._drawn, self._generation = ends, generation
        far = max((end[0] for end in ends if end), default=0)
        shown = [thinned(points) for points in lines]
        self._scale(axis_end(far, last_step), [value for points in shown for _, value in points])
        for mark, points in zip(self.lines, shown, strict=True):
            with mark.hold_sync():
                mark.x = np.array([step for step, _ in points], dtype=float)
                mark.y = np.array([value for _, value in points], dtype=float)
                if mark is self.lines[0]:
                    mark.marker = "circle" if len(points) == 1 else None  # a single point draws no line
        self.key.value = "&emsp;".join(map(_key, self.names, COLOURS, ends))

    def _scale(self, end: int, values: Sequence[float]) -> None:
        """Fits the axes to the values, with round numbers at their ticks."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        for scale, axis, ends, most in (
            (self.x, self.across, (0.0, float(end)), 6),
            (self.y, self.up, (low - room, high + room), self._most),
        ):
            if (scale.min, scale.max) == ends:
                continue
            ticks, form = round_ticks(*ends, most)
            with scale.hold_sync(), axis.hold_sync():
                scale.min, scale.max = ends
                axis.tick_values, axis.tick_format = np.array(ticks), form


def _key(name: str, colour: str, end: tuple[int, float] | None) -> str:
    value = number_text(end[1]) if end else "–"
    mark = f'<i style="background:{colour}"></i>'
    return f'<span class="qlora-key">{mark}{html.escape(name)} <b>{value}</b></span>'


def axis_end(step: int, last_step: int) -> int:
    """Returns where the axis of steps ends: at a round number a little past the last point, and never past the run's end.

    Args:
        step: the last step drawn.
        last_step: the last step of the whole run; 0 if it is not known.
    """
    room = max(10.0, 1.25 * step)
    size = 10 ** math.floor(math.log10(room))
    end = next(int(factor * size) for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if factor * size >= room)
    return max(1, step, min(end, last_step)) if last_step else end


def round_ticks(low: float, high: float, most: int) -> tuple[list[float], str]:
    """Returns about `most` round numbers from `low` to `high`, and the format in which d3 writes them."""
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(factor * size for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * size) <= most)
    ticks = [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    if step >= 1:
        return ticks, "~s" if max(map(abs, ticks), default=0) >= 10_000 else "d"
    if step >= 1e-3:
        return ticks, f".{math.ceil(-math.log10(step) - 1e-9)}f"
    digits = math.floor(math.log10(max(map(abs, ticks), default=step)) + 1e-9) - math.floor(math.log10(step) + 1e-9)
    return ticks, f".{max(0, digits)}~e"  # enough digits to distinguish two ticks


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Returns at most `most` points that look the same: the lowest and highest of each stretch, and both ends."""
    if len(points) <= most:
        return points
    stretches = (most - 2) // 2
    kept = [points[0]]
    inner = points[1:-1]
    for number in range(stretches):
        part = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        low, high = min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])
        kept += sorted({low, high})
    return (*kept, points[-1])
