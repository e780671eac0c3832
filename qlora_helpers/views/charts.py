"""Curves over the optimizer steps: an image in a notebook or a page, a table where there are no images.

This module draws for light and dark themes alike and knows nothing of runs. It imports matplotlib only when it draws.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.style import colour, inline
from qlora_helpers.base.tables import Table, Tabular

GREY = colour("grey")
"""Axes and texts: its contrast is about 4.3 to 1 on white and on JupyterLab's dark background, so neither theme is favoured."""
BLUE, ORANGE = colour("blue"), colour("orange")  # distinct to colour-blind readers; at least 3.6 to 1 on light and dark
LINES = (BLUE, ORANGE, *map(colour, ("third", "fourth", "fifth", "sixth")))
"""One after another for the lines of several runs; where they begin again, the dashes differ."""
DASHES = ("solid", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
TABLE_ROWS = 12
Points = tuple[tuple[int, float], ...]
"""`(step, value)` pairs in the order of their steps."""


@dataclass(frozen=True)
class Panel:
    """One small chart.

    Attributes:
        title: what the vertical axis shows, with its unit.
        lines: name -> `(step, value)` pairs; the first is a solid blue line, the second a dashed orange one with dots.
        names: what the lines are called in the key, where that differs; the lines of several runs are then told apart by colour
            and dashes.
    """

    title: str
    lines: dict[str, Points]
    names: dict[str, str] | None = None


class Chart(Tabular):
    """Panels over the optimizer steps, shown as an image in a notebook and as a table where there are no images.

    Args:
        name: the run's name.
        panels: the small charts; those without a point are skipped.
        columns: how many panels are side by side.
    """

    def __init__(self, name: str, panels: Sequence[Panel], *, columns: int = 1) -> None:
        self.name, self.columns = name, columns
        self.panels = tuple(panel for panel in panels if any(panel.lines.values()))

    def table(self) -> Table:
        """Returns a row for each logged step, thinned to `TABLE_ROWS`; the steps of the shortest line are kept."""
        if not self.panels:
            return Table((), (), caption=f"{self.name}: no step has been logged yet")
        lines = {name: dict(points) for panel in self.panels for name, points in panel.lines.items() if points}
        steps = sorted(set().union(*lines.values()))
        rarest = min(lines.values(), key=len, default={})
        if len(steps) > TABLE_ROWS and len(rarest) < len(steps):
            steps = sorted({steps[0], *rarest, steps[-1]})
        if len(steps) > TABLE_ROWS:
            steps = [steps[round(i * (len(steps) - 1) / (TABLE_ROWS - 1))] for i in range(TABLE_ROWS)]
        rows = [[str(step), *(number_text(points.get(step)) for points in lines.values())] for step in steps]
        return Table(["step", *lines], rows, numbers=range(len(lines) + 1))

    def label(self) -> str:
        """Returns what the chart shows in a sentence, for those who can't see it."""
        parts = []
        for name, points in (line for panel in self.panels for line in panel.lines.items() if line[1]):
            (first, start), (last, end) = points[0], points[-1]
            parts.append(f"{name} from {number_text(start)} at step {first} to {number_text(end)} at step {last}")
        return f"{self.name}: " + ("; ".join(parts) or "no step has been logged yet")

    def svg(self, colour: str = GREY) -> str:
        """Returns an `<svg>` element for an HTML page, or an empty text if there is nothing to draw.

        Args:
            colour: the colour of axes and texts; `currentColor` takes the page's.
        """
        return _svg(self.panels, self.columns, self.label()).replace(GREY, colour) if self.panels else ""

    def _repr_html_(self) -> str:
        """Returns an `<img>`, since JupyterLab removes `<svg>` from notebooks that it does not trust yet, such as fresh clones."""
        if not self.panels:
            return super()._repr_html_()
        data = base64.b64encode(self.svg().encode()).decode()
        width = 600 if self.columns == 1 else 840
        alt = html.escape(self.label())
        return f'<img alt="{alt}" width="{width}" style="{inline("picture")}" src="data:image/svg+xml;base64,{data}">'


def number_text(value: float | None) -> str:
    """Returns a value with as many digits as are worth reading, or an empty text for None."""
    if not value:
        return "" if value is None else "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.1e}"


def _svg(panels: Sequence[Panel], columns: int, label: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # Figure without pyplot keeps no global state; with a fixed salt and no date, equal curves give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qlora_helpers", "font.size": 8}):
        rows = math.ceil(len(panels) / columns)
        size = (4.2, 2.4) if columns == 1 else (2.3 * min(columns, len(panels)), 1.9 * rows)
        figure = Figure(figsize=size, layout="constrained")
        for place, panel in enumerate(panels, start=1):
            _draw(figure.add_subplot(rows, min(columns, len(panels)), place), panel)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    # matplotlib's <style> would apply to the whole page.
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    text = re.sub(
        r' id="(?!m|p)[^"]*"| id="(?:patch|matplotlib)[^"]*"', "", text
    )  # unused, and repeated on a page with two charts
    return re.sub(r'(<svg[^>]*?) width="\S+" height="\S+"', rf'\1 role="img" aria-label="{html.escape(label)}"', text)


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    looks: list[dict[str, Any]] = [{"color": BLUE}, {"color": ORANGE, "linestyle": (0, (4, 2)), "marker": "o"}]
    if panel.names is not None:
        count = len(LINES)
        looks = [
            {"color": LINES[number % count], "linestyle": DASHES[(number % count + number // count) % len(DASHES)]}
            for number in range(len(panel.lines))
        ]
    for (name, points), look in zip(panel.lines.items(), looks, strict=False):
        if points:
            shown = panel.names.get(name, name) if panel.names else name
            dot = "o" if len(points) == 1 else None  # a single point draws no line
            axes.plot(
                *zip(*points, strict=True), label=shown, linewidth=1.4, markersize=3.5, **({"marker": dot} | look)
            )
    axes.set_title(panel.title, loc="left", fontsize=8, color=GREY)
    axes.set_xlabel("optimizer step", color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(colors=GREY)
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    if len(panel.lines) > 1:
        axes.legend(frameon=False, labelcolor=GREY, handlelength=3 if panel.names else 2)
