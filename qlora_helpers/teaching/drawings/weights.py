"""Drawings of weights: a block that is quantised, the levels of NF4 and FP8, and a change of low rank.

Sources: NF4, Dettmers et al. 2023, arXiv:2305.14314; LoRA, Hu et al. 2021, arXiv:2106.09685; FP8, Micikevicius et al. 2022,
arXiv:2209.05433.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from qlora_helpers.base.errors import UserError
from qlora_helpers.teaching.drawings.canvas import WIDTH, Canvas, Drawing, number, paint

Matrix = Sequence[Sequence[float]]
BLOCK = (0.021, -0.004, 0.013, -0.032, 0.002, 0.017, -0.011, 0.006)
W = ((0.4, -0.1, 0.3, 0.0), (0.2, 0.5, -0.3, 0.1), (-0.2, 0.1, 0.6, 0.2), (0.0, 0.3, -0.1, 0.7))
B, A = ((1,), (0,), (2,), (-1,)), ((3, 1, 0, 2),)
NF4_TAIL = 0.9677083  # where the outermost quantile is taken, as bitsandbytes does
FP8_LARGEST = 448.0


def nf4_levels() -> list[float]:
    """Returns NF4's 16 levels between -1 and 1 in rising order: quantiles of the normal distribution, zero among them."""
    normal = NormalDist()
    above = [normal.inv_cdf(NF4_TAIL + (0.5 - NF4_TAIL) * step / 8) for step in range(8)]
    below = [-normal.inv_cdf(NF4_TAIL + (0.5 - NF4_TAIL) * step / 7) for step in range(7)]
    return sorted(value / max(above) for value in [*above, 0.0, *below])


def fp8_levels() -> list[float]:
    """Returns all values of FP8's e4m3 in rising order, divided by the largest, 448: 4 bits of exponent, 3 of fraction."""
    small = [fraction / 8 * 2.0**-6 for fraction in range(8)]
    large = [(1 + fraction / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for fraction in range(8)]
    values = {value for value in small + large if value <= FP8_LARGEST}
    return sorted({sign * value / FP8_LARGEST for value in values for sign in (1, -1)})


@dataclass(frozen=True)
class QuantisedBlock:
    """A block of weights before and after.

    Attributes:
        weights: as they were.
        largest: the block's constant, its largest absolute weight.
        numbers: for each weight the number of the nearest level, 0 to 15.
        restored: level times constant.
    """

    weights: tuple[float, ...]
    largest: float
    numbers: tuple[int, ...]
    restored: tuple[float, ...]


def quantise(weights: Sequence[float]) -> QuantisedBlock:
    """Rounds a block of weights to NF4."""
    largest = max(abs(weight) for weight in weights)
    known = nf4_levels()
    numbers = [min(range(16), key=lambda n: abs(known[n] - weight / largest)) for weight in weights]
    return QuantisedBlock(tuple(weights), largest, tuple(numbers), tuple(known[n] * largest for n in numbers))


def quantised_block(weights: Sequence[float] = BLOCK) -> Drawing:
    """Draws a small block of weights on its way to NF4 and back.

    Args:
        weights: 2 to 8 finite weights, at least one of them not zero. A real block has 64.

    Raises:
        UserError: other weights.
    """
    if not 2 <= len(weights) <= 8 or not all(map(math.isfinite, weights)) or not any(weights):
        raise UserError(
            "that block can't be drawn", expected="2 to 8 finite weights, not all zero", got=str(list(weights))
        )
    block, known, canvas = quantise(weights), nf4_levels(), Canvas()
    rows = {
        "weight": [number(weight, 3) for weight in block.weights],
        f"divided by {number(block.largest, 3)}": [number(weight / block.largest) for weight in block.weights],
        "nearest level": [number(known[n]) for n in block.numbers],
        "its number, stored": [str(n) for n in block.numbers],
        "in four bits": [f"{n:04b}" for n in block.numbers],
        "restored": [number(value, 3) for value in block.restored],
    }
    for at, (name, texts) in enumerate(rows.items()):
        y = 34 + 26 * at
        stored = name == "in four bits"
        canvas.text(16, y, name, bold=stored)
        for column, text in enumerate(texts):
            x = 172 + 66 * column
            if stored:
                canvas.box(x + 4, y - 15, 54, 20, fill=paint("weights"), line=paint("weights"), opacity=0.25)
            canvas.text(x + 31, y, text, anchor="middle", mono=True, bold=stored)

    def at_value(value: float) -> float:
        return 40 + (value + 1) / 2 * (WIDTH - 80)

    canvas.text(16, 206, "each weight moves to the nearest of 16 levels", quiet=True)
    canvas.line([(at_value(-1), 262), (at_value(1), 262)])
    for n, level in enumerate(known):
        canvas.line([(at_value(level), 254), (at_value(level), 270)], colour=paint("orange"), width=2)
        canvas.text(at_value(level), 286, str(n), size=11, anchor="middle")
        if n in (0, 7, 15):
            canvas.text(at_value(level), 302, number(level, 0), size=11, anchor="middle", quiet=True)
    for weight, n in zip(block.weights, block.numbers, strict=True):
        start = at_value(weight / block.largest)
        canvas.line([(start, 226), (at_value(known[n]), 254)], colour=paint("blue"))
        canvas.dot(start, 226, 4, paint("blue"))
    return canvas.finish(
        "A block of weights becomes NF4",
        f"{len(weights)} weights are divided by the largest, {number(block.largest, 3)}. Each moves to the nearest of NF4's 16 "
        f"levels, which are closer together near zero, and the level's number is stored in four bits: "
        f"{', '.join(map(str, block.numbers))}. Level times {number(block.largest, 3)} gives the weight back, rounded.",
        314,
    )


def levels() -> Drawing:
    """Draws which values NF4 and FP8 can hold, below how often weights take them."""
    canvas, nf4, fp8 = Canvas(), nf4_levels(), fp8_levels()
    normal = NormalDist(0, 0.4)  # the largest of 64 normal weights is about 2.5 standard deviations from zero

    def at_value(value: float) -> float:
        return 40 + (value + 1) / 2 * (WIDTH - 80)

    canvas.text(16, 22, "How often a trained weight lies there", bold=True)
    points = [(at_value(step / 50), 110 - 72 * normal.pdf(step / 50) / normal.pdf(0)) for step in range(-50, 51)]
    canvas.line(points, colour=paint("blue"), width=2)
    canvas.line([(at_value(-1), 110), (at_value(1), 110)])
    for y, name, values, shade in (
        (146, f"NF4: {len(nf4)} levels in 4 bits", nf4, "orange"),
        (220, f"FP8 (e4m3): {len(fp8)} values in 8 bits", fp8, "activations"),
    ):
        canvas.text(16, y, name, bold=True)
        for value in values:
            canvas.line([(at_value(value), y + 14), (at_value(value), y + 36)], colour=paint(shade), width=1.2)
    for value, text in ((-1, "− the largest"), (0, "0"), (1, "the largest")):
        anchor = {-1: "start", 0: "middle", 1: "end"}[value]
        canvas.text(at_value(value), 276, text, size=12, anchor=anchor, quiet=True)
    return canvas.finish(
        "What NF4 and FP8 can hold",
        f"Trained weights are mostly near zero. NF4's {len(nf4)} levels are closer together there, and one of them is zero. "
        f"FP8 has {len(fp8)} values, many more near zero than far from it. Both are scaled by the largest weight.",
        288,
    )


def product(b: Matrix, a: Matrix) -> list[list[float]]:
    """Multiplies B, out x r, by A, r x in."""
    return [[sum(row[k] * a[k][column] for k in range(len(a))) for column in range(len(a[0]))] for row in b]


def _checked_sizes(b: Matrix, a: Matrix, w: Matrix) -> tuple[int, int, int]:
    """Returns the sizes out, r and in of three matrices that go together; raises as `low_rank` does."""
    out, r, inner = len(b), len(a), len(a[0])
    fits = all(len(row) == r for row in b) and all(len(row) == inner for row in (*a, *w)) and len(w) == out
    if not fits or r > 2 or max(out, inner) > 4:
        raise UserError(
            "those matrices can't be drawn",
            expected="W of at most 4 x 4, B with as many rows as W, A with as many columns, and a rank of 1 or 2",
            got=f"W {len(w)} x {len(w[0])}, B {out} x {len(b[0])}, A {r} x {inner}",
        )
    return out, r, inner


def low_rank(b: Matrix = B, a: Matrix = A, w: Matrix = W) -> Drawing:
    """Draws a frozen matrix W beside the change B·A that an adapter adds to it.

    Args:
        b: out x r, with r 1 or 2.
        a: r x in.
        w: out x in; both at most 4.

    Raises:
        UserError: sizes that don't go together or are too large to draw.
    """
    out, r, inner = _checked_sizes(b, a, w)
    canvas, change, cell = Canvas(), product(b, a), 38

    def matrix(x: float, rows: Matrix, name: str, shade: str, decimals: int) -> float:
        top = 62 + (out - len(rows)) * cell / 2
        canvas.text(x + len(rows[0]) * cell / 2, 24, name, anchor="middle", bold=True)
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                canvas.box(x + j * cell, top + i * cell, cell, cell, fill=paint(shade), opacity=0.2)
                canvas.text(
                    x + (j + 0.5) * cell, top + (i + 0.62) * cell, number(value, decimals), anchor="middle", mono=True
                )
        return x + len(rows[0]) * cell

    def between(x: float, sign: str) -> float:
        canvas.text(x + 18, 62 + out * cell / 2 + 6, sign, size=20, anchor="middle")
        return x + 36

    middle = 62 + out * cell
    x = matrix(20, w, "W", "weights", 1)
    canvas.text(20 + inner * cell / 2, 42, "frozen", size=12, anchor="middle", quiet=True)
    x = between(x, "+")
    b_at = x
    x = matrix(x, b, "B", "adapters", 0)
    x = between(x, "·")
    x = matrix(x, a, "A", "adapters", 0)
    canvas.text((b_at + x) / 2, 42, "trained", size=12, anchor="middle", quiet=True)
    x = between(x, "=")
    end = matrix(x, change, "B · A", "adapters", 0)
    canvas.text((x + end) / 2, 42, "the change of W", size=12, anchor="middle", quiet=True)
    few, many = r * (out + inner), out * inner
    wide = 8192
    canvas.text(20, middle + 32, f"{few} numbers of B and A change all {many} of W.")
    canvas.text(
        20,
        middle + 54,
        f"In a layer of {wide:,} x {wide:,}, rank 8 takes {8 * 2 * wide:,} numbers instead of {wide * wide:,}.",
    )
    return canvas.finish(
        "W beside B · A",
        f"W is a frozen matrix of {out} x {inner}. B is {out} x {r} and A is {r} x {inner}; only these two are trained. Their "
        f"product has the size of W and is added to it: {few} numbers change {many}. Every row of the product is made of the "
        f"{'row' if r == 1 else 'rows'} of A.",
        int(middle + 68),
        width=max(WIDTH, int(end) + 20),
    )
