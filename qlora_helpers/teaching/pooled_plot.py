"""The runs of a class in one picture: rank and learning rate beside the evaluation loss, and predictions beside measurements.

Only runs of one recipe stand in one picture, and how many others there are is said; a seat's run counts once. Each picture says
in a sentence whether its runs tell the settings apart. Imports no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from qlora_helpers.teaching.drawings.canvas import Canvas, Drawing, paint
from qlora_helpers.teaching.measured import Measured, distinct_runs

LEFT, RIGHT, TOP, BOTTOM = 64, 700, 64, 268
HEIGHT = 360
FAR = 2.0  # times the median: what lies above is drawn at the upper edge, so that one explosion does not flatten all others
MOST_TICKS = 9
Runs = Sequence[Measured]


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: what it shows, and its value of a run."""

    title: str
    name: str
    of: Callable[[Measured], float]
    others: Callable[[Measured], object]  # what has to be equal besides the recipe
    text: Callable[[float], str]
    base: float


RANK = Axis("Rank and evaluation loss", "rank", lambda run: run.rank, lambda run: run.learning_rate, "{:.0f}".format, 2)
RATE = Axis(
    "Learning rate and evaluation loss",
    "learning rate",
    lambda run: run.learning_rate,
    lambda run: run.rank,
    "{:g}".format,
    10,
)


def pooled(found: Iterable[Measured]) -> tuple[Drawing, ...]:
    """Draws the pictures that runs allow: of two values or more of a setting, and of one prediction or more."""
    runs = distinct_runs(found)
    drawn = [_of_setting(runs, axis) for axis in (RANK, RATE)] + [_of_predictions(runs)]
    return tuple(each for each in drawn if each is not None)


def _of_setting(runs: Runs, axis: Axis) -> Drawing | None:
    """One setting across, the lowest evaluation loss up; None where no two runs differ in this setting alone."""
    groups: dict[object, list[Measured]] = defaultdict(list)
    for run in runs:
        groups[run.recipe, axis.others(run)].append(run)
    chosen = max(groups.values(), key=lambda group: (len({axis.of(run) for run in group}), len(group)), default=[])
    by_value: dict[float, list[Measured]] = defaultdict(list)
    for run in sorted(chosen, key=axis.of):
        by_value[axis.of(run)].append(run)
    if len(by_value) < 2:
        return None
    said = [_about(axis, value, group) for value, group in by_value.items()]
    verdict = _verdict(axis, by_value)
    rest = _rest(len(runs) - len(chosen), axis)
    canvas = Canvas()
    low, high = _losses_shown([run.loss for run in chosen])
    steps = [math.log(value, axis.base) for value in by_value]
    first, last = steps[0] - 0.3, steps[-1] + 0.3

    def place(value: float, loss: float) -> tuple[float, float]:
        across = (math.log(value, axis.base) - first) / (last - first)
        return LEFT + across * (RIGHT - LEFT), _up(loss, low, high)

    _frame(canvas, low, high, axis.title, f"{axis.name}, on a logarithmic axis")
    for value in _ticks(list(by_value), axis.base):
        x, _ = place(value, low)
        canvas.line([(x, BOTTOM), (x, BOTTOM + 4)])
        canvas.text(x, BOTTOM + 18, axis.text(value), size=11, anchor="middle")
    canvas.line(
        [place(value, fmean(run.loss for run in group)) for value, group in by_value.items()], colour=paint("grey")
    )
    for value, group in by_value.items():
        x, y = place(value, fmean(run.loss for run in group))
        canvas.line([(x - 9, y), (x + 9, y)], colour=paint("grey"), width=3)
        for number, run in enumerate(group):  # side by side, so that equal losses are seen as several runs
            _dot(canvas, x + 5 * (number % 5 - min(2, len(group) // 2)), place(value, run.loss)[1], far=run.loss > high)
    _key(canvas, "a run", "mean of the runs with one value", far=any(run.loss > high for run in chosen), high=high)
    _write_below(canvas, [verdict, rest])
    return canvas.finish(
        axis.title,
        f"{len(chosen)} runs that share all settings but {axis.name} and seed. {' '.join(said)} {verdict} {rest}".strip(),
        HEIGHT,
    )


def _about(axis: Axis, value: float, group: Runs) -> str:
    losses, seeds = [run.loss for run in group], len({run.seed for run in group})
    between = (
        f"{min(losses):.2f} to {max(losses):.2f}, mean {fmean(losses):.2f}" if len(group) > 1 else f"{losses[0]:.2f}"
    )
    return (
        f"{axis.name.capitalize()} {axis.text(value)}: {len(group)} {_plural('run', group)} with {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}, {between}."
    )


def _plural(word: str, items: Sequence[object]) -> str:
    return word if len(items) == 1 else f"{word}s"


def _verdict(axis: Axis, by_value: Mapping[float, Runs]) -> str:
    """Whether the runs tell the values apart: the spread between seeds is the yardstick, so one seed alone tells nothing."""
    lone = [value for value, group in by_value.items() if len({run.seed for run in group}) < 2]
    if lone:
        return (
            f"{axis.name.capitalize()} {axis.text(lone[0])} has one seed: nobody knows yet by how much its loss varies."
        )
    ordered = sorted(by_value.items(), key=lambda item: fmean(run.loss for run in item[1]))
    for (better, low), (worse, high) in zip(ordered, ordered[1:], strict=False):
        if max(run.loss for run in low) >= min(run.loss for run in high):
            return (
                f"The ranges of {axis.text(better)} and {axis.text(worse)} overlap: these runs don't tell them apart."
            )
    return f"No ranges overlap: with these seeds, {axis.name} {axis.text(ordered[0][0])} has the lowest loss."


def _rest(left_out: int, axis: Axis) -> str:
    if not left_out:
        return ""
    runs = "1 run that differs" if left_out == 1 else f"{left_out} runs that differ"
    return f"{runs} in more than the {axis.name} {'is' if left_out == 1 else 'are'} left out."


def _of_predictions(runs: Runs) -> Drawing | None:
    """The committed loss across, the measured one up; None where nobody committed one."""
    committed = [(run.predicted, run.loss) for run in runs if run.predicted is not None]
    if not committed:
        return None
    low, high = _losses_shown([loss for pair in committed for loss in pair])
    close = sum(abs(predicted - loss) <= 0.1 * loss for predicted, loss in committed)
    lower = sum(predicted < loss for predicted, loss in committed)
    title, count = "Predicted and measured loss", len(committed)
    verdict = f"{close} of {count} {_plural('prediction', committed)} {'is' if close == 1 else 'are'} within a tenth of the loss."
    canvas = Canvas()

    def across(loss: float) -> float:
        return LEFT + (min(loss, high) - low) / (high - low) * (RIGHT - LEFT)

    _frame(canvas, low, high, title, "committed before anything was measured")
    for value in _round_values(low, high):
        canvas.line([(across(value), BOTTOM), (across(value), BOTTOM + 4)])
        canvas.text(across(value), BOTTOM + 18, f"{value:g}", size=11, anchor="middle")
    canvas.line([(across(low), _up(low, low, high)), (across(high), _up(high, low, high))], colour=paint("grey"))
    for predicted, loss in committed:
        _dot(canvas, across(predicted), _up(loss, low, high), far=max(predicted, loss) > high)
    far = any(max(pair) > high for pair in committed)
    _key(canvas, "a run", "as predicted", far=far, high=high)
    _write_below(canvas, [verdict, "Above the line the loss was higher than predicted."])
    return canvas.finish(
        title,
        f"{count} committed {_plural('prediction', committed)} beside the measured loss. {verdict} {lower} of them "
        f"{'is' if lower == 1 else 'are'} lower than what was measured, and {count - lower} not.",
        HEIGHT,
    )


def _losses_shown(losses: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest loss of an axis, with some room around what is drawn."""
    limit = FAR * median(losses)
    inner = [loss for loss in losses if loss <= limit]
    low, high = min(inner), max(inner)
    room = max(0.08 * (high - low), 0.02)
    return max(0.0, low - room), high + room


def _up(loss: float, low: float, high: float) -> float:
    return BOTTOM - (min(loss, high) - low) / (high - low) * (BOTTOM - TOP)


def _frame(canvas: Canvas, low: float, high: float, title: str, across: str) -> None:
    canvas.text(LEFT, 20, title, bold=True)
    canvas.text(LEFT, 40, "lowest evaluation loss", size=11, quiet=True)
    for value in _round_values(low, high):
        y = _up(value, low, high)
        canvas.line([(LEFT, y), (RIGHT, y)], colour=paint("line"))
        canvas.text(LEFT - 8, y + 4, f"{value:g}", size=11, anchor="end")
    canvas.line([(LEFT, BOTTOM), (RIGHT, BOTTOM)])
    canvas.text(RIGHT, BOTTOM + 36, across, size=11, anchor="end", quiet=True)


def _dot(canvas: Canvas, x: float, y: float, *, far: bool) -> None:
    canvas.dot(x, y, 5, paint("orange" if far else "blue"))
    if far:  # an arrow upwards, so that it is told without colour
        canvas.arrow((x, y), (x, y - 14))


def _key(canvas: Canvas, dot: str, line: str, *, far: bool, high: float) -> None:
    canvas.dot(LEFT + 200, 36, 5, paint("blue"))
    canvas.text(LEFT + 210, 40, dot, size=11)
    canvas.line([(LEFT + 262, 36), (LEFT + 282, 36)], colour=paint("grey"), width=3)
    canvas.text(LEFT + 288, 40, line, size=11)
    if far:
        canvas.dot(LEFT + 520, 36, 5, paint("orange"))
        canvas.text(LEFT + 530, 40, f"above {high:.3g}", size=11)


def _write_below(canvas: Canvas, lines: Iterable[str]) -> None:
    for number, text in enumerate(line for line in lines if line):
        canvas.text(LEFT, BOTTOM + 62 + 20 * number, text, size=12)


def _ticks(values: Sequence[float], base: float) -> list[float]:
    """The values themselves where they are few and far apart, else powers of the base between them."""
    steps = [math.log(value, base) for value in values]
    room = (steps[-1] - steps[0]) / 12
    if len(values) <= MOST_TICKS and all(b - a >= room for a, b in zip(steps, steps[1:], strict=False)):
        return list(values)
    powers = [base**power for power in range(math.ceil(steps[0] - 0.25), math.floor(steps[-1] + 0.25) + 1)]
    thinned = powers[:: math.ceil(len(powers) / MOST_TICKS)] if powers else []
    return thinned if len(thinned) > 1 else [values[0], values[-1]]


def _round_values(low: float, high: float) -> list[float]:
    """Round numbers between two values, about five."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [round(number * step, 10) for number in range(first, math.floor(high / step) + 1)]
