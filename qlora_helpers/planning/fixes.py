"""Where nothing fits: the mildest change of the settings with which something does, and the cheapest instance.

Imports no torch; knows nothing of how a plan is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import INSTANCES, Hardware, parse_gpus
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.candidates import Candidate, all_candidates, fitting_in
from qlora_helpers.planning.memory import predict
from qlora_helpers.planning.step_settings import step_settings

SHORTEST = 256  # tokens of a block that still holds a dialogue
LENGTH_STEP = 64  # tokens; a shorter block is looked for in these steps


def smallest_change(
    shape: dict[str, Any],
    hardware: Hardware,
    config: RunConfig,
    tokens: int,
    trained_share: float,
    one_process: bool = False,
) -> tuple[list[str], Candidate] | None:
    """The mildest change with which something fits, and the fastest that then does.

    From the mildest on: an optimizer of 8 bits, 4-bit weights, a lower rank, blocks as long as then fit, and these together.
    """
    shares = (hardware.gpus,) if one_process else None

    def fastest(change: list[str]) -> Candidate | None:
        changed = config.with_settings(change)
        fitting = fitting_in(hardware, all_candidates(shape, hardware, changed, tokens, trained_share, shares))
        return fitting[0] if fitting else None

    def fastest_shorter(change: list[str]) -> tuple[list[str], Candidate] | None:
        length = _longest(config, lambda item: fastest([*change, item]))
        return ([*change, length], fastest([*change, length])) if length else None

    singles = _changes(config)
    for change in [[each] for each in singles]:
        if best := fastest(change):
            return change, best
    if found := fastest_shorter([]):
        return found
    best = fastest(singles) if len(singles) > 1 else None
    return (singles, best) if best else fastest_shorter(singles) if singles else None


def _changes(config: RunConfig) -> list[str]:
    """What can be changed beside the length of a block, the mildest first."""
    changes = ["train.optim=adamw_8bit"] if config.train.optim != "adamw_8bit" else []
    changes += ["model.quantization=nf4"] if config.model.quantization != "nf4" else []
    return changes + (["adapter.r=8"] if config.adapter.r > 8 else [])


def _longest(config: RunConfig, fits: Callable[[str], Any]) -> str | None:
    """The setting of the longest block, in steps of `LENGTH_STEP` tokens, that is shorter than the asked one and fits."""
    least = math.ceil(max(SHORTEST, config.evaluation.max_new_tokens + 1) / LENGTH_STEP)
    most = (config.data.seq_len_tokens - 1) // LENGTH_STEP
    named = "data.seq_len_tokens={}".format
    if most < least or not fits(named(least * LENGTH_STEP)):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(named(middle * LENGTH_STEP)) else (least, middle - 1)
    return named(least * LENGTH_STEP)


def cheapest_instance(shape: dict[str, Any], config: RunConfig, trained_share: float) -> Hardware | None:
    """The catalogue's cheapest instance by the hour on which something fits; where none does, the smallest without a price."""

    def price_then_size(other: Hardware) -> tuple[float, float]:
        return math.inf if other.price_usd_per_hour is None else other.price_usd_per_hour, other.gpus * other.usable_gib

    for other in sorted(map(parse_gpus, INSTANCES), key=price_then_size):
        if can_fit(shape, other, config, trained_share):
            return other
    return None


def can_fit(shape: dict[str, Any], hardware: Hardware, config: RunConfig, trained_share: float) -> bool:
    """Whether something fits even uncompiled: one block at once, with no layer recomputed or with all of them."""
    sizes = model_sizes(shape)
    for gpus in sorted({1, hardware.gpus}):
        step = step_settings(config, shape, blocks=1, compiled=False, trained_share=trained_share)
        for checkpointed in (0, sizes.blocks):
            _, memory = predict(
                sizes,
                replace(step, checkpointed=checkpointed, offloaded=checkpointed > 0 and config.train.fast_step),
                gpus=gpus,
            )
            if max(gib(each.total) for each in memory) <= hardware.usable_gib:
                return True
    return False
