"""Charts that grow while a run trains, drawn by bqplot in the browser; only what changed is sent there.

Owns their looks. `charts` draws the same curves as still pictures, in the same colours.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import bqplot
import ipywidgets
import numpy as np

from qlora_helpers.charts import BLUE, ORANGE, Points, number_text

MOST_POINTS = 500
COLOURS = (BLUE, ORANGE)
STYLE = """<style>
.qlora-chart .bqplot {
  --bq-axis-tick-text-fill: var(--jp-ui-font-color2, #666); --bq-axislabel-fill: var(--jp-ui-font-color2, #666);
  --bq-axis-path-stroke: var(--jp-border-color1, #bbb); --bq-axis-tick-stroke: var(--jp-border-color2, #ddd);
  --bq-axis-tick-text-font: 11px var(--jp-ui-font-family, sans-serif); --bq-background: transparent;
  --bq-plotarea-background-fill: transparent; }
.qlora-chart .qlora-key { font-size: 12px; color: var(--jp-ui-font-color2, #666); white-space: nowrap; }
.qlora-chart .qlora-key b { color: var(--jp-ui-font-color1, inherit); font-variant-numeric: tabular-nums; font-weight: 600; }
.qlora-chart .qlora-key i { display: inline-block; width: 14px; height: 3px; margin: 0 5px 3px 0; vertical-align: middle; }
</style>"""


class LiveChart:
    """One chart with one or two lines over the optimizer steps.

    Args:
        names: of the lines, as its key shows them.
        height_px: of the drawing.
        tick_format: of the vertical axis, as d3 writes it.

    Attributes:
        box: the widget.
        lines: bqplot's marks, in the order of the names.
        key: the names with their latest values.
    """

    def __init__(self, names: Sequence[str], *, height_px: int, tick_format: str = ".3~g") -> None:
        self.names = tuple(names)
        self.x, self.y = bqplot.LinearScale(min=0.0, max=10.0), bqplot.LinearScale()
        looks = ({"colors": [BLUE]}, {"colors": [ORANGE], "marker": "circle", "marker_size": 24})
        self.lines = [
            bqplot.Lines(x=[], y=[], scales={"x": self.x, "y": self.y}, stroke_width=1.8, **look)
            for _, look in zip(names, looks, strict=False)
        ]
        few = max(3, height_px // 40)
        across = bqplot.Axis(scale=self.x, tick_format="~s", num_ticks=6, grid_lines="none")
        up = bqplot.Axis(scale=self.y, side="left", tick_format=tick_format, num_ticks=few, grid_lines="none")
        figure = bqplot.Figure(
            marks=self.lines, axes=[across, up], fig_margin={"top": 6, "bottom": 24, "left": 50, "right": 12},
            min_aspect_ratio=0.1, max_aspect_ratio=100, padding_y=0.05, animation_duration=0,
            layout={"width": "100%", "height": f"{height_px}px", "min_width": "0"},
        )  # fmt: skip
        self.key = ipywidgets.HTML()
        self.box = ipywidgets.VBox([self.key, figure], layout={"width": "100%", "overflow": "hidden"})
        self.box.add_class("qlora-chart")
        self._drawn: list[tuple[int, float] | None] = []
        self._generation = -1

    def show(self, lines: Sequence[Points], *, last_step: int, generation: int = 0) -> None:
        """Draws what is new; where nothing is, nothing is sent.

        Args:
            lines: in the order of the names.
            last_step: of the whole run; the axis grows towards it.
            generation: where it changes, points may have been taken back.
        """
        ends = [points[-1] if points else None for points in lines]
        if ends == self._drawn and generation == self._generation:
            return
        self._drawn, self._generation = ends, generation
        far = max((end[0] for end in ends if end), default=0)
        self.x.max = float(axis_end(far, last_step))
        for mark, points in zip(self.lines, lines, strict=True):
            shown = thinned(points)
            with mark.hold_sync():
                mark.x = np.array([step for step, _ in shown], dtype=float)
                mark.y = np.array([value for _, value in shown], dtype=float)
                if mark is self.lines[0]:
                    mark.marker = "circle" if len(shown) == 1 else None  # one point makes no line
        self.key.value = "&emsp;".join(map(_key, self.names, COLOURS, ends))


def _key(name: str, colour: str, end: tuple[int, float] | None) -> str:
    value = number_text(end[1]) if end else "–"
    mark = f'<i style="background:{colour}"></i>'
    return f'<span class="qlora-key">{mark}{html.escape(name)} <b>{value}</b></span>'


def axis_end(step: int, last_step: int) -> int:
    """Where the axis of steps ends: a little past what is drawn, at a round number, and never past the run's end.

    Args:
        step: the last one drawn.
        last_step: of the whole run; 0 where it is not known.
    """
    room = max(10.0, 1.25 * step)
    size = 10 ** math.floor(math.log10(room))
    end = next(int(factor * size) for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if factor * size >= room)
    return max(1, step, min(end, last_step)) if last_step else end


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points that look the same: of each stretch the lowest and the highest, and both ends."""
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
