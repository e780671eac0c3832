"""Decides how many sequences an optimizer step of a new run takes, and on a GPU the fastest way to hold them.

On several GPUs a start decides how they share the step, and its processes how layers are computed: that is left open.
Imports no torch; reads no file.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.data.lengths import RowLengths
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.decide_lengths import ANSWER, FEWEST_PACKED, SEQUENCE, SMALL_LENGTHS, rounded
from qlora_helpers.planning.decided import Decided
from qlora_helpers.planning.layout import ONE
from qlora_helpers.planning.memory import usable_with_margin
from qlora_helpers.planning.plan import Plan, make_plan
from qlora_helpers.planning.step_settings import is_packed
from qlora_helpers.planning.workload import TrainingTokens, Workload

FEWEST_STEPS, MOST_SEQUENCES, CPU_SEQUENCES = 50, 16, 4  # optimizer steps of a training; sequences in one
CPU_KEPT = 1e9  # parameters from which a CPU recomputes activations, to save memory
BATCH, ACCUMULATION, CHECKPOINTING = (
    "train.micro_batch_size",
    "train.gradient_accumulation_steps",
    "train.activation_checkpointing",
)
PLANNED = (
    *(BATCH, ACCUMULATION, CHECKPOINTING),
    *("train.checkpointed_layers", "train.compile", "train.offload_embeddings"),
)


def decide_batch(
    decided: Decided,
    lengths: RowLengths,
    shape: dict[str, Any],
    hardware: Hardware | None,
    parameters: int | None,
    *,
    known: TrainingTokens | None = None,
) -> None:
    """Decides batch, accumulation and what is recomputed; on GPUs the fastest plan that fits, with shorter sequences if need be.

    What a start on several GPUs decides itself stays open.

    Args:
        decided: the settings so far; gets the decisions.
        lengths: of the training rows.
        shape: the model's `config.json`.
        hardware: the GPUs; None means a CPU.
        parameters: of the model; None where they are not known.
        known: the data as a start plans for them; None takes the measured lengths.
    """
    in_all = sequences_an_epoch(decided.config, lengths, shape) * decided.config.train.epochs
    most = MOST_SEQUENCES if hardware else CPU_SEQUENCES
    per_step = max((2**n for n in range(10) if 2**n <= most and in_all / 2**n >= FEWEST_STEPS), default=1)
    why = f"{in_all:,.0f} sequences in all, {per_step} an optimizer step: {FEWEST_STEPS} steps or more"
    if in_all < FEWEST_STEPS:
        why = f"{in_all:,.0f} sequences in all: each is an optimizer step"
    if hardware is None:
        _decide_on_cpu(decided, per_step, parameters, why)
        return
    per_step = _beside_by_hand(decided, per_step)
    known = known or TrainingTokens(lengths.tokens, lengths.trained_share)
    plan = _fitting_plan(decided, lengths, shape, hardware, per_step, known)
    if plan is not None and plan.choice is not None:
        if hardware.gpus > 1 and decided.config.train.share != ONE:
            _take_sizes(
                decided, per_step, plan.choice.micro_batch_size, f"{why}; a start shares them out over the GPUs"
            )
        else:
            _take_plan(decided, plan.choice, hardware, per_step, why)
        return
    _take_sizes(decided, per_step, 1, why)
    text = "this model can't be planned" if plan is None else f"nothing fits on {hardware.label}"
    decided.take(CHECKPOINTING, True, f"{text}: least memory")
    if plan is not None:
        decided.notes.append(f"this does not fit: {plan.shortfall_gib:.1f} GiB are missing on {hardware.label}")
        decided.notes += [f"would fit: {fix}" for fix in plan.fixes]


def _decide_on_cpu(decided: Decided, per_step: int, parameters: int | None, why: str) -> None:
    _take_sizes(decided, per_step, 2 if decided.value(SEQUENCE) <= SMALL_LENGTHS else 1, why)
    heavy = parameters is None or parameters >= CPU_KEPT
    text = "a large model on a CPU: memory counts more than time" if heavy else "a small model: its activations fit"
    decided.take(CHECKPOINTING, heavy, text)


def _beside_by_hand(decided: Decided, per_step: int) -> int:
    """Returns the sequences of an optimizer step, with the micro-batch or the passes that a person has set."""
    if BATCH in decided.by_hand:
        micro = int(decided.value(BATCH))
        passes = int(decided.value(ACCUMULATION)) if ACCUMULATION in decided.by_hand else max(1, per_step // micro)
        return micro * passes
    if ACCUMULATION in decided.by_hand:
        passes = int(decided.value(ACCUMULATION))
        return max(1, per_step // passes) * passes
    return per_step


def _take_plan(decided: Decided, choice: Candidate, hardware: Hardware, per_step: int, why: str) -> None:
    """Takes a plan's settings; beside one that was set by hand, what is recomputed and compiled is left to the trainer."""
    if decided.by_hand and any(name in decided.by_hand for name in PLANNED):
        _take_sizes(decided, per_step, choice.micro_batch_size, why)
        return
    fits = f"fastest that fits on {hardware.label}: {choice.peak_gib:.1f} GiB, {choice.tokens_per_s:,.0f} tokens/s"
    planned = Decided(decided.config.with_settings(choice.settings))
    for name in PLANNED:
        decided.take(name, planned.value(name), f"{why}; {fits}" if name == BATCH else "of the same plan")


def _take_sizes(decided: Decided, per_step: int, micro: int, why: str) -> None:
    """Takes micro-batch and accumulation that make up a step's sequences, beside whichever of them was set by hand."""
    if ACCUMULATION in decided.by_hand and BATCH not in decided.by_hand:
        micro = max(1, per_step // decided.value(ACCUMULATION))
    decided.take(BATCH, min(micro, per_step), why)
    decided.take(ACCUMULATION, max(1, per_step // decided.value(BATCH)), "makes up the same step")


def _fitting_plan(
    decided: Decided,
    lengths: RowLengths,
    shape: dict[str, Any],
    hardware: Hardware,
    per_step: int,
    known: TrainingTokens,
) -> Plan | None:
    """Plans with the wanted sequence length, and with shorter ones where that does not fit; None where nothing can be planned."""
    wanted = decided.config.data.seq_len_tokens
    first, length = None, wanted
    while True:
        config = decided.config.with_settings({SEQUENCE: length, BATCH: per_step, ACCUMULATION: 1})
        workload = Workload(config, shape, hardware, known.in_all(config), known.trained_share)
        spare = replace(hardware, usable_gib=usable_with_margin(hardware.usable_gib))
        try:
            plan = make_plan(workload.on(spare), fix=False)
            plan = plan if plan.fits else make_plan(workload, fix=length == wanted)
        except ModelError:
            return None
        first = first or plan
        if plan.fits or SEQUENCE in decided.by_hand:
            break
        shorter = rounded(length // 2)
        if shorter >= length or shorter < FEWEST_PACKED or shorter <= decided.value(ANSWER):
            return first
        length = shorter
    if length != wanted:
        longer = sum(total > length for total in lengths.totals)
        why = f"{wanted:,} tokens don't fit on {hardware.label}; {longer:,} of {lengths.measured:,} rows are longer"
        decided.config = decided.config.with_settings({SEQUENCE: length})
        decided.decisions = [
            replace(each, value=length, reason=why) if each.setting == SEQUENCE else each for each in decided.decisions
        ]
    return plan


def sequences_an_epoch(config: RunConfig, lengths: RowLengths, shape: dict[str, Any]) -> int:
    """Estimates the sequences of an epoch: packed ones full to their end, padded ones a row each."""
    length = config.data.seq_len_tokens
    if not is_packed(config, shape):
        return max(1, lengths.rows)
    if not lengths.answers:  # long documents are split
        return max(1, math.ceil(lengths.tokens / length))
    kept = sum(min(total, length) for total in lengths.totals) * lengths.rows / max(1, lengths.measured)
    return max(1, math.ceil(kept / length))
