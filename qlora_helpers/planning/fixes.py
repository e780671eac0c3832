"""Where nothing fits: the mildest change of the settings with which something does, and the cheapest instance.

Imports no torch; knows nothing of how a plan is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import Hardware, parse_gpus
from qlora_helpers.machine.instances import INSTANCES
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.candidates import all_candidates, fitting_candidates
from qlora_helpers.planning.memory import predict
from qlora_helpers.planning.workload import Workload

MIN_SEQ_LEN_TOKENS = 256  # a sequence that still holds a dialogue
LEAST_RANK = 8  # no lower one is offered
LENGTH_STEP_TOKENS = 64  # shorter sequences are tried in these steps


def smallest_change(workload: Workload) -> tuple[list[str], Candidate] | None:
    """Finds the mildest change with which something fits, and the fastest candidate that then does.

    From the mildest on: inputs of checkpointed layers in the host's memory, an 8-bit optimizer,
    4-bit weights, the highest lower rank that fits, sequences as long as then fit, and these together.
    """

    def fastest(change: list[str]) -> Candidate | None:
        changed = workload.with_settings(change)
        fitting = fitting_candidates(all_candidates(changed), workload.hardware.usable_gib)
        return fitting[0] if fitting else None

    def fastest_shorter(change: list[str]) -> tuple[list[str], Candidate] | None:
        length = _longest_fitting(workload.config, lambda item: fastest([*change, item]))
        found = fastest([*change, length]) if length else None
        return ([*change, length], found) if length and found else None

    singles = _changes(workload.config)
    ranks = _lower_ranks(workload.config)
    for change in [[each] for each in [*singles, *ranks]]:
        if best := fastest(change):
            return change, best
    if found := fastest_shorter([]):
        return found
    singles += ranks[-1:]
    best = fastest(singles) if len(singles) > 1 else None
    return (singles, best) if best else fastest_shorter(singles) if singles else None


def _changes(config: RunConfig) -> list[str]:
    """Lists what can be changed besides the rank and the sequence length, the mildest first."""
    train = config.train
    offload = train.fast_step and train.activation_checkpointing and not train.offload_checkpoints
    changes = ["train.offload_checkpoints=true"] if offload else []
    changes += ["train.optim=adamw_8bit"] if config.train.optim != "adamw_8bit" else []
    changes += ["model.quantization=nf4"] if config.model.quantization != "nf4" else []
    return changes


def _lower_ranks(config: RunConfig) -> list[str]:
    """Lists lower ranks, the highest first: powers of two down to `LEAST_RANK`."""
    powers = [1 << power for power in range(config.adapter.r.bit_length() - 1, -1, -1)]
    return [f"adapter.r={rank}" for rank in powers if LEAST_RANK <= rank < config.adapter.r]


def _longest_fitting(config: RunConfig, fits: Callable[[str], Any]) -> str | None:
    """Finds the longest sequence that fits and is shorter than the asked one, in steps of `LENGTH_STEP_TOKENS`, as a setting.

    It stays longer than an answer, which the settings must leave room for.
    """
    least = math.ceil(max(MIN_SEQ_LEN_TOKENS, config.evaluation.max_new_tokens + 1) / LENGTH_STEP_TOKENS)
    most = (config.data.seq_len_tokens - 1) // LENGTH_STEP_TOKENS
    setting = "data.seq_len_tokens={}".format
    if most < least or not fits(setting(least * LENGTH_STEP_TOKENS)):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(setting(middle * LENGTH_STEP_TOKENS)) else (least, middle - 1)
    return setting(least * LENGTH_STEP_TOKENS)


def cheapest_instance(workload: Workload) -> Hardware | None:
    """Finds the instance with the lowest known price an hour on which something fits; else the smallest without a price."""

    def price_then_size(other: Hardware) -> tuple[float, float]:
        return math.inf if other.price_usd_per_hour is None else other.price_usd_per_hour, other.gpus * other.usable_gib

    for other in sorted(map(parse_gpus, INSTANCES), key=price_then_size):
        if can_fit(workload.on(other)):
            return other
    return None


def can_fit(workload: Workload) -> bool:
    """Whether anything fits even uncompiled: one sequence at once, with no checkpointed layer or with all of them."""
    for layout in workload.layouts:
        for checkpointed in (0, workload.sizes.layers):
            step = workload.step(
                micro_batch_size=1,
                compiled=False,
                checkpointed=checkpointed,
                offloaded=checkpointed > 0 and workload.config.train.fast_step and layout.shards == 1,
                copies=layout.copies,
                shards=layout.shards,
            )
            _, memory = predict(workload.sizes, step, gpus=layout.spread)
            if max(gib(each.total) for each in memory) <= workload.hardware.usable_gib:
                return True
    return False
