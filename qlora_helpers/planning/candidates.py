"""Ways to run a training: every micro-batch size with as few checkpointed layers as fit, with its bytes, speed, time and price.

Bytes are `memory`'s, seconds are `speed`'s; `plan` chooses among the candidates. Imports no torch; knows nothing of runs on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_helpers.base.units import duration, gib
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.planning.memory import (
    CAPTURE_ROOM_GIB,
    GpuMemory,
    MemoryDetails,
    StepMemory,
    memory_details,
    predict,
)
from qlora_helpers.planning.speed import COMPILE_S, step_seconds
from qlora_helpers.planning.step_settings import StepSettings
from qlora_helpers.planning.workload import Workload, copies_sharing

MAX_MICRO_BATCH = 256  # sequences; larger micro-batches are no faster
COPIES_EFFICIENCY = 0.95  # assumed: processes wait for each other and average gradients; adapters are small


@dataclass(frozen=True)
class Candidate:
    """One way to run the training.

    Attributes:
        step: settings of one forward and backward pass on each GPU; its `copies` are processes that each hold the whole model
            (torchrun), 1 where the layers are spread over the GPUs.
        gradient_accumulation_steps: forward passes per optimizer step.
        layers_per_gpu, memory, details: of each GPU that holds a part of one copy.
        tokens_per_s: over all GPUs, of sequences filled to their end.
        seconds: for the whole data.
        dollars: at the hardware's price; None where it is not known.
    """

    step: StepSettings
    gradient_accumulation_steps: int
    layers_per_gpu: tuple[int, ...]
    memory: tuple[GpuMemory, ...]
    details: tuple[MemoryDetails, ...]
    tokens_per_s: float
    seconds: float
    dollars: float | None

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one forward pass on each GPU."""
        return self.step.micro_batch_size

    @property
    def seq_len_tokens(self) -> int:
        """Length of a sequence."""
        return self.step.seq_len_tokens

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return sum(self.layers_per_gpu)

    @property
    def checkpointed(self) -> int:
        """Decoder layers with activation checkpointing."""
        return self.step.checkpointed

    @property
    def compiled(self) -> bool:
        """Whether decoder layers are compiled."""
        return self.step.compiled

    @property
    def captured(self) -> bool:
        """Whether passes are replayed as CUDA graphs."""
        return self.step.captured

    @property
    def fp8(self) -> bool:
        """Whether frozen weights are multiplied in FP8."""
        return self.step.fp8

    @property
    def offloaded(self) -> bool:
        """Whether the input embedding is in the host's memory."""
        return self.step.offloaded

    @property
    def copies(self) -> int:
        """Processes that each hold the whole model."""
        return self.step.copies

    @property
    def peak_gib(self) -> float:
        """What the fullest GPU must have free, GiB."""
        return max(gib(each.total) for each in self.memory)

    @property
    def optimizer_step_s(self) -> float:
        """Seconds of one optimizer step."""
        return self.step.tokens * self.gradient_accumulation_steps * self.copies / self.tokens_per_s

    @property
    def settings(self) -> list[str]:
        """As `--set` takes them."""
        return [
            f"data.seq_len_tokens={self.seq_len_tokens}",
            f"train.micro_batch_size={self.micro_batch_size}",
            f"train.gradient_accumulation_steps={self.gradient_accumulation_steps}",
            f"train.activation_checkpointing={'true' if self.checkpointed else 'false'}",
            f"train.checkpointed_layers={self.checkpointed}",
            f"train.compile={'on' if self.compiled else 'off'}",
            f"train.offload_embeddings={'true' if self.offloaded else 'false'}",
        ]

    def __repr__(self) -> str:
        how = [f"{self.checkpointed} of {self.layers} layers checkpointed"]
        how += ["compiled"] if self.compiled else []
        how += ["as CUDA graphs"] if self.captured else []
        how += ["in FP8"] if self.fp8 else []
        how += ["embedding on the host"] if self.offloaded else []
        how += ["inputs on the host"] if self.step.inputs_on_host and self.checkpointed else []
        how += [f"a copy on each of {self.copies} GPUs"] if self.copies > 1 else []
        how += [f"over {len(self.layers_per_gpu)} GPUs"] if len(self.layers_per_gpu) > 1 else []
        dollars = "" if self.dollars is None else f", ${self.dollars:,.2f}"
        return (
            f"{self.micro_batch_size} x {self.seq_len_tokens} tokens, {self.gradient_accumulation_steps} passes a step, "
            f"{', '.join(how)}: "
            f"{self.peak_gib:.1f} GiB, {self.tokens_per_s:,.0f} tokens/s, {duration(self.seconds)}{dollars}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "seq_len_tokens": self.seq_len_tokens,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "checkpointed": self.checkpointed,
            "layers": self.layers,
            "compiled": self.compiled,
            "captured": self.captured,
            "offloaded": self.offloaded,
            "fp8": self.fp8,
            "copies": self.copies,
            "layers_per_gpu": list(self.layers_per_gpu),
            "memory_gib": [memory.parts_gib() for memory in self.memory],
            "details_gib": [{name: gib(value) for name, value in vars(each).items()} for each in self.details],
            "allocated_gib": [gib(memory.allocated) for memory in self.memory],
            "reserved_gib": [gib(memory.reserved) for memory in self.memory],
            "peak_gib": self.peak_gib,
            "tokens_per_s": self.tokens_per_s,
            "seconds": self.seconds,
            "dollars": self.dollars,
            "settings": self.settings,
        }


def all_candidates(workload: Workload, gpus_per_copy: tuple[int, ...] | None = None) -> list[Candidate]:
    """Lists every micro-batch size that makes up the asked sequences per optimizer step, on every allowed spread over GPUs.

    Without the fast step either all layers are checkpointed or none, as `Trainer` does it.

    Args:
        workload: what is trained, and on what.
        gpus_per_copy: how many GPUs hold one copy of the model; None takes all that the workload allows.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    all_gpus, found = workload.hardware.gpus, []
    for gpus in gpus_per_copy or workload.gpus_per_copy:
        copies = copies_sharing(workload.sequences_per_step, all_gpus) if gpus == 1 else 1
        if copies == 1 and gpus != all_gpus:  # some GPUs would be idle
            continue
        per_copy = workload.sequences_per_step // copies
        captured = gpus == copies == 1 and workload.may_capture
        for size in micro_batch_sizes(per_copy):
            for offloaded in workload.embedding_places:
                for compiled in (True, False) if workload.may_compile else (False,):
                    step = workload.step(
                        micro_batch_size=size, compiled=compiled, captured=captured, offloaded=offloaded, copies=copies
                    )
                    for count in _checkpointed_counts(workload, step, gpus):
                        again = replace(step, checkpointed=count)
                        found.append(
                            candidate(workload, again, gpus=gpus, gradient_accumulation_steps=per_copy // size)
                        )
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


def fastest_data_parallel(workload: Workload) -> Candidate | None:
    """Finds the fastest candidate with a copy of the model on as many GPUs as share the sequences (torchrun), if any fits."""
    if workload.hardware.gpus == 1:
        return None
    fitting = fitting_candidates(all_candidates(workload, (1,)), workload.hardware.usable_gib)
    return fitting[0] if fitting else None


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


def copies_speedup(copies: int) -> float:
    """Returns how many times as fast several processes are as one."""
    return 1.0 if copies == 1 else copies * COPIES_EFFICIENCY


def candidate(workload: Workload, step: StepSettings, *, gpus: int, gradient_accumulation_steps: int) -> Candidate:
    """Works out a step's memory, speed, time and price.

    Args:
        workload: what is trained, and on what.
        step: the settings; its `copies` of the model are each on `gpus` GPUs.
        gpus: how many hold one copy of the model together.
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
    rate = copies_speedup(step.copies) * step.tokens / step_seconds(sizes, step, workload.gpu)
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
    )
