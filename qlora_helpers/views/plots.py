"""Lines over the optimizer steps as geometry: scales, round ticks, smoothing and paths.

The live charts put it into HTML, and `still_picture` into an image. This module knows nothing of runs and widgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_helpers.views.charts import BLUE, Points, number_text

MOST_POINTS = 400
UNITS = 1000
"""Paths are drawn in a square of so many units, whose lower left corner is (0, 1000)."""


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: as the key shows it.
        points: what is drawn.
        raw: the points before smoothing, drawn faintly behind; empty where nothing was smoothed.
        colour: a CSS colour.
        dots: whether each point gets a dot.
    """

    name: str
    points: Points
    raw: Points = ()
    colour: str = BLUE
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: `resumed`, `saved` or `best`, the last with its value."""

    kind: str
    step: int
    value: float | None = None


@dataclass(frozen=True)
class Plot:
    """What one chart shows.

    Attributes:
        title: the vertical axis with its unit.
        lines: the lines, the most important one first.
        marks: what happened at which step.
        log: whether the vertical axis is logarithmic; values of 0 and less are then not drawn.
        nothing: the text that is shown where there is no point.
        decimals: how many digits a value has after its point; None takes as many as are worth reading.
        ceiling: what no value can exceed; the axis ends there instead of above it.
    """

    title: str
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()
    log: bool = False
    nothing: str = "no step has been logged yet"
    decimals: int | None = None
    ceiling: float | None = None

    def text(self, value: float) -> str:
        """Returns one of its values as text."""
        return number_text(value) if self.decimals is None else f"{value:.{self.decimals}f}"


@dataclass(frozen=True)
class Drawing:
    """A plot's geometry.

    Attributes:
        plot: what it shows.
        across: the first and the last step of the horizontal axis.
        up: the lowest and the highest value of the vertical axis.
        steps, values: ticks as `(place, text)`; the place is a share of the axis, 0 to 1.
        shown: the points of each line between the two steps, thinned.
        paths: for each line the path of its raw points, of its points, and of its dots.
    """

    plot: Plot
    across: tuple[float, float]
    up: tuple[float, float]
    steps: tuple[tuple[float, str], ...]
    values: tuple[tuple[float, str], ...]
    shown: tuple[Points, ...]
    paths: tuple[tuple[str, str, str], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(self.shown)

    def place(self, step: float, value: float | None = None) -> tuple[float, float]:
        """Returns where a step and a value are, as shares of the two axes from the lower left corner."""
        x = (step - self.across[0]) / (self.across[1] - self.across[0])
        return x, 0.0 if value is None else _share(value, self.up, self.plot.log)

    def marks(self) -> list[Mark]:
        """Returns the marks between the two steps."""
        return [mark for mark in self.plot.marks if self.across[0] <= mark.step <= self.across[1]]

    def label(self) -> str:
        """Returns what the plot shows in a sentence, for those who can't see it."""
        parts = []
        for line, points in zip(self.plot.lines, self.shown, strict=True):
            if points:
                (first, start), (last, end) = points[0], points[-1]
                parts.append(
                    f"{line.name} from {self.plot.text(start)} at step {first} to {self.plot.text(end)} at step {last}"
                )
        return f"{self.plot.title}: {'; '.join(parts) or self.plot.nothing}"


def drawn(
    plot: Plot, across: tuple[float, float], *, ticks: tuple[int, int] = (6, 5), most: int = MOST_POINTS
) -> Drawing:
    """Computes a plot's geometry.

    Args:
        plot: what to draw.
        across: the first and the last step to show.
        ticks: how many ticks the two axes have at most, about.
        most: how many points a line has at most.
    """
    across = (across[0], max(across[1], across[0] + 1))
    inside = [
        [thinned(_inside(points, across, plot.log), most) for points in (line.raw, line.points)] for line in plot.lines
    ]
    values = [value for both in inside for points in both for _, value in points]
    up = _ends(values, plot.log)
    if plot.ceiling is not None and max(values, default=0.0) <= plot.ceiling:
        up = up[0], min(up[1], plot.ceiling)
    marks_up = log_ticks(*up) if plot.log else ()
    found = Drawing(
        plot,
        across,
        up,
        tuple((_share(tick, across, False), text) for tick, text in written(*across, ticks[0], whole=True)),
        tuple((_share(tick, up, plot.log), text) for tick, text in marks_up or written(*up, ticks[1])),
        tuple(points for _, points in inside),
    )
    paths = tuple(
        (_path(raw, found), _path(points, found), _dots(points, found) if line.dots or len(points) == 1 else "")
        for (raw, points), line in zip(inside, plot.lines, strict=True)
    )
    return replace(found, paths=paths)


def _inside(points: Points, across: tuple[float, float], log: bool) -> Points:
    first, last = across
    return tuple(each for each in points if first <= each[0] <= last and (each[1] > 0 or not log))


def _ends(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Returns the ends of the vertical axis, with some room above and below the values."""
    low, high = min(values, default=0.0 if not log else 0.1), max(values, default=1.0)
    if log:
        room = (high / low) ** 0.06 if high > low else 1.5
        return low / room, high * room
    is_constant = high - low <= 1e-9 * max(abs(low), abs(high))  # smoothing leaves noise of rounding
    room = 0.1 * abs(high) or 1.0 if is_constant else 0.06 * (high - low)
    return low - room, high + room


def _share(value: float, ends: tuple[float, float], log: bool) -> float:
    if log:
        low, high = math.log(ends[0]), math.log(ends[1])
        return (math.log(max(value, ends[0])) - low) / (high - low)
    return (value - ends[0]) / (ends[1] - ends[0])


def _path(points: Points, drawing: Drawing) -> str:
    return "M" + "L".join(_at(point, drawing) for point in points) if len(points) > 1 else ""


def _dots(points: Points, drawing: Drawing) -> str:
    """Returns lines without a length, which round ends make dots, however the square is stretched."""
    return "".join(f"M{_at(point, drawing)}h0" for point in points)


def _at(point: tuple[int, float], drawing: Drawing) -> str:
    x, y = drawing.place(*point)
    return f"{UNITS * x:.0f} {UNITS * (1 - y):.0f}"


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


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Returns about `most` round numbers from `low` to `high`."""
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(factor * size for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * size) <= most)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Returns 1, 2 and 5 times powers of ten, or powers alone where these are many; none where fewer than two fit."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    every = max(1, math.ceil(len(powers) / 6))
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    found = [factor * 10.0**power for power in powers[::every] for factor in factors]
    inside = [tick for tick in found if low <= tick <= high]
    return [(tick, f"{tick:.3g}") for tick in inside] if len(inside) > 1 else []


def written(low: float, high: float, most: int, *, whole: bool = False) -> list[tuple[float, str]]:
    """Returns round ticks with their texts, which differ and have no more digits than they need.

    Args:
        low, high, most: as for `round_ticks`.
        whole: whether only whole numbers count, such as steps.
    """
    ticks = round_ticks(low, high, most)
    if whole:
        ticks = [tick for tick in ticks if abs(tick - round(tick)) < 1e-9]
    largest = max(map(abs, ticks), default=0.0)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else largest or 1.0
    if largest >= 10_000:
        forms = [(1000.0, ".0f", "k"), (1000.0, ".1f", "k"), (1.0, ".0f", "")]
    elif step >= 1e-3 or largest >= 0.1:
        forms = [(1.0, f".{digits}f", "") for digits in range(9)]
    else:
        forms = [(1.0, f".{digits}e", "") for digits in range(9)]

    def texts(size: float, form: str, unit: str) -> list[str]:
        return [format(tick / size, form) + unit for tick in ticks]

    def is_exact(size: float, form: str, unit: str) -> bool:
        return all(abs(float(format(tick / size, form)) * size - tick) < 1e-3 * step for tick in ticks)

    shortest = next((form for form in forms if is_exact(*form)), forms[-1])
    return [(tick, _short(text)) for tick, text in zip(ticks, texts(*shortest), strict=True)]


def _short(text: str) -> str:
    """Returns `2e-04` as `2e-4`, and a zero as `0`."""
    number, _, power = text.partition("e")
    if not float(number.removesuffix("k")):
        return "0"
    return f"{number}e{int(power)}" if power else text


def smoothed(points: Points, weight: float) -> Points:
    """Returns an exponential moving average; its start is corrected, so that it begins at the first value.

    Args:
        points: the raw points.
        weight: of the past, from 0 to below 1; 0 leaves the points as they are.
    """
    if not weight:
        return points
    found, average, total = [], 0.0, 0.0
    for step, value in points:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        found.append((step, average / total))
    return tuple(found)


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
