"""Drawings of training: the loop of a step, and loss curves to diagnose."""

from __future__ import annotations

import math
import random

from qlora_helpers.teaching.drawings.canvas import Canvas, Drawing, paint

STEPS = 40
Curve = list[float]
# What each pair of curves shows, in the order in which they are drawn with letters.
SHAPES = {
    "too high a learning rate": "both losses fall, then jump up at once and stay there",
    "good": "both losses fall, steeply at first and then slowly, and stay close together",
    "nothing learned": "both losses stay where they began",
    "overfitting": "the training loss keeps falling while the evaluation loss turns and rises",
}


def training_loop() -> Drawing:
    """Draws what happens in one training step, and what is frozen and what moves."""
    canvas = Canvas()
    parts = (
        ("1 Batch", "a few rows", "of tokens"),
        ("2 Forward pass", "a probability for", "each next token"),
        ("3 Loss", "how surprised was", "it by the text?"),
        ("4 Backward pass", "the gradient of", "A and B"),
        ("5 Optimizer step", "A and B move", "a little"),
    )
    canvas.box(158, 16, 404, 36, fill=paint("weights"), line=paint("weights"), opacity=0.2)
    canvas.text(360, 39, "W, in 4 bits: used in both passes, never changed", anchor="middle")
    canvas.box(580, 16, 124, 36, fill=paint("adapters"), line=paint("adapters"), opacity=0.25)
    canvas.text(642, 39, "A and B", anchor="middle")
    for at, (name, *lines) in enumerate(parts):
        x = 16 + 141 * at
        shade = paint("adapters") if at == 4 else "currentColor"
        canvas.box(x, 88, 124, 76, fill=shade, line=shade, opacity=0.2 if at == 4 else 0.04)
        canvas.text(x + 62, 110, name, anchor="middle", bold=True, size=11.5)
        for down, text in enumerate(lines):
            canvas.text(x + 62, 132 + 18 * down, text, anchor="middle", size=11.5)
        if at < 4:
            canvas.arrow((x + 124, 126), (x + 141, 126))
    canvas.arrow((219, 52), (219, 88))
    canvas.arrow((501, 52), (501, 88))
    canvas.arrow((642, 88), (642, 52))
    canvas.arrow((642, 164), (642, 194), (78, 194), (78, 164))
    canvas.text(360, 214, "the next step takes the next batch; all rows once are an epoch", anchor="middle", size=12.5)
    canvas.text(
        360,
        240,
        "Every few steps: the evaluation loss on rows that are never trained, and a checkpoint.",
        anchor="middle",
        size=12.5,
        quiet=True,
    )
    return canvas.finish(
        "The training loop",
        "A step has five parts: take a batch of rows, give each next token a probability in the forward pass, compute the "
        "loss, compute the gradient of the adapters A and B in the backward pass, and move A and B a little. W is used in both "
        "passes and never changed. The next step takes the next batch; all rows once are an epoch. Every few steps the loss is "
        "also taken on rows that are never trained, and a checkpoint is written.",
        256,
    )


def curves() -> dict[str, tuple[Curve, Curve]]:
    """Returns training and evaluation losses over `STEPS` steps for each shape. They are made by formulas, not measured."""
    draw = random.Random(0)

    def rough(values: Curve, size: float) -> Curve:
        return [value + draw.uniform(-size, size) for value in values]

    fall = [2.1 + 1.1 * math.exp(-step / 7) - 0.004 * step for step in range(STEPS)]
    memory = [3.2 - 2.4 * (1 - math.exp(-step / 16)) for step in range(STEPS)]
    turned = [2.2 + 1.0 * math.exp(-step / 5) + 0.0011 * max(0, step - 10) ** 2 for step in range(STEPS)]
    jump = [value if step < 12 else 6.2 + 0.3 * math.sin(step) for step, value in enumerate(fall)]
    flat = [3.2 - 0.001 * step for step in range(STEPS)]
    return {
        "too high a learning rate": (rough(jump, 0.12), [value + 0.15 for value in jump]),
        "good": (rough(fall, 0.1), [value + 0.12 for value in fall]),
        "nothing learned": (rough(flat, 0.1), [value + 0.08 for value in flat]),
        "overfitting": (rough(memory, 0.08), turned),
    }


def four_curves(*, named: bool = True) -> Drawing:
    """Draws four pairs of loss curves.

    Args:
        named: writes what each shows; without it they have letters, so that a reader can diagnose them first.
    """
    canvas, top = Canvas(), 7.0
    canvas.line([(16, 18), (44, 18)], colour=paint("blue"), width=2)
    canvas.text(52, 22, "training loss", size=12)
    for start in (160, 172, 184):
        canvas.line([(start, 18), (start + 6, 18)], colour=paint("orange"), width=2.5)
    canvas.text(198, 22, "evaluation loss", size=12)
    said = []
    for at, (name, (train, evaluated)) in enumerate(curves().items()):
        left, upper = 46 + 350 * (at % 2), 66 + 176 * (at // 2)

        def place(step: int, value: float, left: int = left, upper: int = upper) -> tuple[float, float]:
            return left + step / (STEPS - 1) * 290, upper + 120 * (1 - value / top)

        letter = "ABCD"[at]
        canvas.text(left - 30, upper - 12, f"{letter}: {name}" if named else letter, bold=True)
        for value in (0, 2, 4, 6):
            x, y = place(0, value)
            canvas.line([(x, y), (x + 290, y)], colour=paint("line"))
            canvas.text(x - 8, y + 4, str(value), size=11, anchor="end", quiet=True)
        canvas.text(left + 290, upper + 138, "steps", size=11, anchor="end", quiet=True)
        canvas.line([place(step, value) for step, value in enumerate(train)], colour=paint("blue"), width=2)
        points = [place(step, value) for step, value in enumerate(evaluated)]
        for start in range(0, STEPS - 1, 2):  # dashes, so that the two can be told apart without colour
            canvas.line(points[start : start + 2], colour=paint("orange"), width=2.5)
        said.append(f"{letter}{f', {name}' if named else ''}: {SHAPES[name]}.")
    return canvas.finish("Four loss curves", " ".join(said), 400)
