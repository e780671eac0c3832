"""Ways to run a training: every micro-batch size with as few checkpointed layers as fit, with its bytes, speed, time and price.

Bytes are `memory`'s, seconds are `speed`'s; `plan` chooses among the candidates. Imports no torch; knows nothing of runs on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qlora_helpers.base.units import gib
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.exchange import exchange
from qlora_helpers.planning.gpu_memory import GpuMemory
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.memory import (
    CAPTURE_ROOM_GIB,
    StepMemory,
    memory_details,
    predict,
)
from qlora_helpers.planning.speed import COMPILE_S, step_time
from qlora_helpers.planning.step_settings import StepSettings
from qlora_helpers.planning.workload import Workload

MAX_MICRO_BATCH = 256  # sequences; larger micro-batches are no faster
COPIES_EFFICIENCY = 0.95  # assumed: processes wait for each other at every optimizer step


def all_candidates(workload: Workload, chosen: Sequence[Layout] | None = None) -> list[Candidate]:
    """Lists every micro-batch size that makes up the asked sequences per optimizer step, on every allowed layout over GPUs.

    Without the fast step either all layers are checkpointed or none, as `Trainer` does it.

    Args:
        workload: what is trained, and on what.
        chosen: how the GPUs may be used; None takes every way that the workload allows.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    found = []
    for layout in workload.layouts if chosen is None else chosen:
        a_process = workload.sequences_per_step // layout.processes
        captured = layout.shards == layout.spread == 1 and workload.may_capture
        for size in micro_batch_sizes(a_process):
            for offloaded in workload.embedding_places if layout.shards == 1 else (False,):
                for compiled in (True, False) if workload.may_compile else (False,):
                    step = workload.step(
                        micro_batch_size=size,
                        compiled=compiled,
                        captured=captured,
                        offloaded=offloaded,
                        copies=layout.copies,
                        shards=layout.shards,
                    )
                    for count in _checkpointed_counts(workload, step, layout.spread):
                        again = replace(step, checkpointed=count)
                        passes = a_process // size
                        found.append(candidate(workload, again, gpus=layout.spread, gradient_accumulation_steps=passes))
    return found


def _checkpointed_counts(workload: Workload, step: StepSettings, gpus: int) -> list[int]:
    """How many layers to try with checkpointing: the fewest that fit, with and without CUDA graphs, and all of them."""
    sizes = workload.sizes
    if not workload.config.train.fast_step:
        return [0, sizes.layers]
    fewest = {
        fewest_checkpointed(sizes, replace(step, captured=captured), workload.hardware.usable_gib, gpus=gpus)
        for captured in {step.captured, False}
    }
    return sorted(fewest | {sizes.layers})


def fitting_candidates(candidates: Sequence[Candidate], usable_gib: float) -> list[Candidate]:
    """Returns the candidates that fit, the one that ends first before the others."""
    fitting = [each for each in candidates if each.peak_gib <= usable_gib]
    return sorted(fitting, key=lambda each: each.seconds)


def micro_batch_sizes(sequences: int) -> list[int]:
    """Lists micro-batch sizes that make up so many sequences."""
    return [count for count in range(1, min(sequences, MAX_MICRO_BATCH) + 1) if sequences % count == 0]


def fewest_checkpointed(sizes: ModelSizes, step: StepSettings, usable_gib: float, *, gpus: int = 1) -> int:
    """Finds how many decoder layers must checkpoint their activations to fit; all of them where even that does not.

    Passes that are captured as CUDA graphs must leave room for the capture; where they can't, they count as not captured.

    Args:
        sizes: of the model.
        step: its `checkpointed` does not count.
        usable_gib: of each GPU, the CUDA context included.
        gpus: how many hold one copy of the model together.
    """
    step_memory = StepMemory(sizes, step, gpus)

    def fits(checkpointed: int) -> bool:
        _, memory = step_memory.with_checkpointed(checkpointed)
        return _needed_gib(memory, step) <= usable_gib

    if step.captured and not fits(sizes.layers):
        return fewest_checkpointed(sizes, replace(step, captured=False), usable_gib, gpus=gpus)
    if fits(0):  # apart from the search: the first checkpointed layer costs what one layer holds while it is recomputed
        return 0
    fewest, most = 1, sizes.layers
    while fewest < most:  # from one layer on, memory falls
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if fits(middle) else (middle + 1, most)
    return fewest


def _needed_gib(memory: Sequence[GpuMemory], step: StepSettings) -> float:
    """Returns what the fullest GPU must have free; with CUDA graphs also room for the capture beside a pass's peak."""
    room = CAPTURE_ROOM_GIB if step.captured else 0.0
    return max(max(gib(each.total), gib(each.allocated + each.context) + room) for each in memory)


def copies_speedup(processes: int) -> float:
    """Returns how many times as fast several processes are as one, without what they send each other."""
    return 1.0 if processes == 1 else processes * COPIES_EFFICIENCY


def candidate(workload: Workload, step: StepSettings, *, gpus: int, gradient_accumulation_steps: int) -> Candidate:
    """Works out a step's memory, speed, time and price.

    Args:
        workload: what is trained, and on what.
        step: the settings, with its copies and shards.
        gpus: on how many the layers of one copy lie one after another.
        gradient_accumulation_steps: forward passes per optimizer step.
    """
    sizes, hardware = workload.sizes, workload.hardware
    step = replace(step, offloaded=step.offloaded and not sizes.tied)
    if gpus > 1 and workload.config.train.matmul_dtype == "auto":
        step = replace(step, fp8=False)  # as the trainer does
    layers, memory = predict(sizes, step, gpus=gpus)
    if step.captured and _needed_gib(memory, step) > hardware.usable_gib:
        step = replace(step, captured=False)  # as the trainer does where a capture finds no room
        layers, memory = predict(sizes, step, gpus=gpus)
    time = step_time(sizes, step, workload.gpu)
    sent = exchange(sizes, step, hardware, time)
    of_a_pass = time.seconds(sent.waits_s) + sent.average_s / gradient_accumulation_steps
    rate = copies_speedup(step.copies * step.shards) * step.tokens / of_a_pass
    seconds = workload.tokens / rate + (COMPILE_S if step.compiled else 0.0)
    price = hardware.price_usd_per_hour
    return Candidate(
        step=step,
        gradient_accumulation_steps=gradient_accumulation_steps,
        layers_per_gpu=layers,
        memory=memory,
        details=memory_details(sizes, step, layers),
        tokens_per_s=rate,
        seconds=seconds,
        dollars=None if price is None else price * seconds / 3600,
        exchange=sent,
    )
