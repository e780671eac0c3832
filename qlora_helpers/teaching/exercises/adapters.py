"""Exercises of notebook 02: count what is trained, and what a rank costs."""

from __future__ import annotations

import math
from typing import Any

from qlora_helpers.teaching.exercise import Exercise, Wrong, call, number_of


def adapter_parameters(layers, r):
    """The solution of `count_adapters`."""
    return sum(r * (inputs + outputs) for inputs, outputs in layers)


def _judge_count(function: Any) -> str:
    import random

    draw = random.Random()
    for _ in range(5):
        layers = [(draw.randrange(64, 9000), draw.randrange(64, 9000)) for _ in range(draw.randrange(2, 9))]
        r = draw.choice((4, 8, 16, 64))
        right = sum(r * (a + b) for a, b in layers)
        got = number_of(call(function, list(layers), r), "the count")
        known = {
            "one-matrix": sum(r * a for a, b in layers),
            "other-matrix": sum(r * b for a, b in layers),
            "full": sum(a * b for a, b in layers),
            "square": sum(r * r * (a + b) for a, b in layers),
            "product": sum(r * a * b for a, b in layers),
        }
        if got == right:
            continue
        for code, value in known.items():
            if got == value:
                raise Wrong(code)
        raise Wrong(message=f"For layers {layers} (inputs, outputs) and r = {r} expected {right:,}; got {got:,.0f}.")
    return "Five drawn models agree: r · (inputs + outputs), summed over the layers."


COUNT_ADAPTERS = Exercise(
    name="count_adapters",
    title="How many parameters are trained",
    kind="write",
    minutes=5,
    question="Write adapter_parameters(layers, r): a list of (inputs, outputs) and the rank become the number of trained "
    "parameters.",
    judge=_judge_count,
    misconceptions={
        "one-matrix": "You counted A (r × inputs) and forgot B (outputs × r).",
        "other-matrix": "You counted B (outputs × r) and forgot A (r × inputs).",
        "full": "That is the number of frozen weights. LoRA trains two thin matrices beside them.",
        "square": "r appears once in each matrix: A has r × inputs entries, B has outputs × r.",
        "product": "A and B stand beside each other. Their entries are added; they are multiplied only as matrices.",
    },
    hints=(
        "Look at the picture of W, B and A: how many entries has each of the two thin ones?",
        "A has r rows and `inputs` columns; B has `outputs` rows and r columns.",
    ),
    solution_is=adapter_parameters,
)


def _judge_rank(answer: Any) -> str:
    from qlora_helpers.base.config import AdapterConfig
    from qlora_helpers.base.units import gib
    from qlora_helpers.model.parameter_counts import count_from_shape
    from qlora_helpers.model.shapes.catalog import SHAPES

    shape = SHAPES["falcon-40b"]
    small, large = (count_from_shape(shape, AdapterConfig(r=r)).trainable for r in (8, 64))
    more = gib(16 * (large - small))  # weight, gradient and Adam's two averages, four bytes each
    got = number_of(answer, "the additional memory in GiB")
    frozen = 21.0
    if math.isclose(got, more, rel_tol=0.1):
        return (
            f"{more:.1f} GiB more: 16 bytes for each of {large - small:,} more parameters, beside frozen weights of "
            f"about {frozen:.0f} GiB."
        )
    if got > 4 * frozen:
        raise Wrong("eightfold")
    if math.isclose(got, gib(4 * (large - small)), rel_tol=0.1) or math.isclose(
        got, gib(2 * (large - small)), rel_tol=0.1
    ):
        raise Wrong("weights-alone")
    if math.isclose(got, gib(16 * large), rel_tol=0.1):
        raise Wrong("whole")
    if got <= 0:
        raise Wrong("nothing")
    raise Wrong(message=f"Count again: {large - small:,} more parameters at 16 bytes each; got {got:g} GiB.")


RANK_COST = Exercise(
    name="rank_cost",
    title="What a higher rank costs",
    kind="predict and measure",
    minutes=5,
    question="How many GiB more do weights, gradients and Adam's averages take when Falcon-40B's rank goes from 8 to 64? "
    "Answer with a number.",
    judge=_judge_rank,
    misconceptions={
        "eightfold": "Eight times the rank is not eight times the memory: the frozen weights, which are most of it, stay "
        "as they are.",
        "weights-alone": "That counts the adapter's weights alone. Each trained weight also has a gradient and Adam's two "
        "averages.",
        "whole": "That is the whole memory of the adapter at r = 64. The question is how much more it is than at r = 8.",
        "nothing": "A higher rank has more trained parameters, and each of them takes 16 bytes.",
    },
    hints=(
        "At r = 8 there are 55,541,760 trained parameters, and the number grows in proportion to the rank.",
        "Each trained parameter takes 16 bytes: 4 for itself, 4 for its gradient, 8 for Adam.",
        "(8 − 1) · 55,541,760 · 16 bytes, in GiB of 1024³ bytes.",
    ),
    solution_is="7 · 55,541,760 more parameters · 16 bytes / 1024³ = 5.8 GiB.",
    cell="7 * 55_541_760 * 16 / 1024**3",
)
