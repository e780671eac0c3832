"""Ways to run a training: every micro-batch with as few recomputed layers as fit, each with its bytes, speed, time and price.

Bytes are `memory`'s, seconds `speed`'s; `plan` chooses among them. Imports no torch; knows nothing of runs on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.units import duration, gib
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.model.shapes.families import draws_at_random
from qlora_helpers.model.shapes.sizes import ModelSizes, model_sizes
from qlora_helpers.planning.memory import RECORDING_ROOM_GIB, Beside, GpuMemory, StepMemory, beside, predict
from qlora_helpers.planning.speed import COMPILE_S, UNNAMED_GPU, step_seconds
from qlora_helpers.planning.step_settings import StepSettings, is_packed, may_record, step_settings

MOST_BLOCKS = 256  # in a micro-batch: larger ones are no faster
COPIES_EFFICIENCY = 0.95  # assumed: several processes wait for each other and average gradients; adapters are small


@dataclass(frozen=True)
class Candidate:
    """One way to run the training.

    Attributes:
        blocks, accumulation: micro-batch on each GPU, and forward passes per optimizer step.
        checkpointed: decoder layers that recompute their activations, of `layers`.
        compiled: whether layers are compiled.
        captured: whether passes are played from CUDA graphs.
        offloaded: whether the input embedding lies in the host's memory.
        copies: processes that each hold the whole model (torchrun); 1 where the layers are spread over the GPUs.
        layers_per_gpu, memory, beside: of each GPU that holds a part of one copy.
        seq_len_tokens: length of a block.
        tokens_per_s: over all GPUs, of blocks filled to their end.
        seconds: for the whole data.
        dollars: at the hardware's price; None where it is not known.
    """

    blocks: int
    accumulation: int
    checkpointed: int
    layers: int
    compiled: bool
    captured: bool
    offloaded: bool
    copies: int
    layers_per_gpu: tuple[int, ...]
    memory: tuple[GpuMemory, ...]
    beside: tuple[Beside, ...]
    seq_len_tokens: int
    tokens_per_s: float
    seconds: float
    dollars: float | None

    @property
    def peak_gib(self) -> float:
        """What the fullest GPU must have free, GiB."""
        return max(gib(each.total) for each in self.memory)

    @property
    def optimizer_step_s(self) -> float:
        """Seconds of one optimizer step."""
        return self.blocks * self.accumulation * self.copies * self.seq_len_tokens / self.tokens_per_s

    @property
    def settings(self) -> list[str]:
        """As `--set` takes them."""
        return [
            f"data.seq_len_tokens={self.seq_len_tokens}",
            f"train.micro_batch_size={self.blocks}",
            f"train.gradient_accumulation_steps={self.accumulation}",
            f"train.activation_checkpointing={'true' if self.checkpointed else 'false'}",
            f"train.checkpointed_layers={self.checkpointed}",
            f"train.compile={'on' if self.compiled else 'off'}",
            f"train.offload_embeddings={'true' if self.offloaded else 'false'}",
        ]

    def __repr__(self) -> str:
        how = [f"{self.checkpointed} of {self.layers} layers recomputed"]
        how += ["compiled"] if self.compiled else []
        how += ["as CUDA graphs"] if self.captured else []
        how += ["embedding on the host"] if self.offloaded else []
        how += [f"a copy on each of {self.copies} GPUs"] if self.copies > 1 else []
        how += [f"over {len(self.layers_per_gpu)} GPUs"] if len(self.layers_per_gpu) > 1 else []
        dollars = "" if self.dollars is None else f", ${self.dollars:,.2f}"
        return (
            f"{self.blocks} x {self.seq_len_tokens} tokens, {self.accumulation} a step, {', '.join(how)}: "
            f"{self.peak_gib:.1f} GiB, {self.tokens_per_s:,.0f} tokens/s, {duration(self.seconds)}{dollars}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "blocks": self.blocks,
            "seq_len_tokens": self.seq_len_tokens,
            "accumulation": self.accumulation,
            "checkpointed": self.checkpointed,
            "layers": self.layers,
            "compiled": self.compiled,
            "captured": self.captured,
            "offloaded": self.offloaded,
            "copies": self.copies,
            "layers_per_gpu": list(self.layers_per_gpu),
            "memory_gib": [memory.parts_gib() for memory in self.memory],
            "beside_gib": [{name: gib(value) for name, value in vars(each).items()} for each in self.beside],
            "allocated_gib": [gib(memory.allocated) for memory in self.memory],
            "reserved_gib": [gib(memory.reserved) for memory in self.memory],
            "peak_gib": self.peak_gib,
            "tokens_per_s": self.tokens_per_s,
            "seconds": self.seconds,
            "dollars": self.dollars,
            "settings": self.settings,
        }


def fastest_in_several_processes(
    shape: dict[str, Any], hardware: Hardware, config: RunConfig, tokens: int, trained_share: float
) -> Candidate | None:
    """The fastest that fits with copies of the model on as many GPUs as share the blocks (torchrun); None where there is none."""
    if hardware.gpus == 1:
        return None
    fitting = fitting_in(hardware, all_candidates(shape, hardware, config, tokens, trained_share, (1,)))
    return fitting[0] if fitting else None


def all_candidates(
    shape: dict[str, Any],
    hardware: Hardware,
    config: RunConfig,
    tokens: int,
    trained_share: float,
    shares: tuple[int, ...] | None = None,
) -> list[Candidate]:
    """Every micro-batch that makes up the asked blocks an optimizer step, with as many GPUs a copy as `shares` says.

    Where it says nothing: one copy over all GPUs, or a copy on each of as many as can share the blocks. Without the fast step all
    layers recompute or none, as Trainer does it.
    """
    sizes, per_step = model_sizes(shape), blocks_per_step(config)
    compiled_or_not = (True, False) if may_compile(config, shape) else (False,)
    ways = [(placed, compiled) for placed in embedding_places(sizes, config) for compiled in compiled_or_not]
    base, found = step_settings(config, shape, blocks=1, trained_share=trained_share), []
    for gpus in shares or sorted({1, hardware.gpus}):
        copies = copies_that_share(per_step, hardware.gpus) if gpus == 1 else 1
        captured = gpus == copies == 1 and records(config, shape, hardware)
        for blocks in divisors(per_step // copies) if copies > 1 or gpus == hardware.gpus else []:
            accumulation = per_step // (blocks * copies)
            for placed, compiled in ways:
                step = replace(
                    base, blocks=blocks, compiled=compiled, captured=captured, offloaded=placed, copies=copies
                )
                fewest = {
                    fewest_checkpointed(sizes, replace(step, captured=replayed), hardware.usable_gib, gpus=gpus)
                    for replayed in {captured, False}
                }
                for count in sorted(fewest | {sizes.blocks} if config.train.fast_step else {0, sizes.blocks}):
                    again = replace(step, checkpointed=count)
                    found.append(
                        candidate(sizes, again, hardware, tokens, gpus=gpus, copies=copies, accumulation=accumulation)
                    )
    return found


def copies_that_share(blocks: int, gpus: int) -> int:
    """The most GPUs, with a copy of the model on each, that can share so many blocks of an optimizer step evenly."""
    return max(count for count in range(1, gpus + 1) if blocks % count == 0)


def blocks_per_step(config: RunConfig) -> int:
    """Blocks that an optimizer step learns from: they are what the settings ask for, however they are shared out."""
    return config.train.micro_batch_size * config.train.gradient_accumulation_steps


def divisors(number: int) -> list[int]:
    """Micro-batches that make up so many blocks."""
    return [count for count in range(1, min(number, MOST_BLOCKS) + 1) if number % count == 0]


def embedding_places(sizes: ModelSizes, config: RunConfig) -> tuple[bool, ...]:
    """Whether the input embedding may be in the host's memory: not where it is the output layer, nor without the fast step."""
    return (False,) if sizes.tied or not config.train.fast_step else (False, True)


def may_compile(config: RunConfig, shape: dict[str, Any]) -> bool:
    """Whether layers may be compiled: not without the fast step, nor where rows are padded and differ in length."""
    return config.train.fast_step and is_packed(config, shape)


def records(config: RunConfig, shape: dict[str, Any], hardware: Hardware) -> bool:
    """Whether one process records its passes on one of these GPUs."""
    in_16_bits = (hardware.gpu or UNNAMED_GPU).supports_bf16 and config.model.compute_dtype != "float16"
    dropout = config.adapter.lora_dropout > 0 or draws_at_random(shape)
    return in_16_bits and may_record(config.train, is_packed(config, shape), dropout, model_sizes(shape))


def fewest_checkpointed(sizes: ModelSizes, step: StepSettings, usable_gib: float, *, gpus: int = 1) -> int:
    """How many decoder layers must recompute their activations to fit; all of them where even that does not.

    Passes that are recorded must leave room for it; where they can't, those that are not recorded count.

    Args:
        sizes: of the model.
        step: its `checkpointed` does not count.
        usable_gib: of each GPU, the CUDA context included.
        gpus: how many hold one copy of the model together.
    """

    held = StepMemory(sizes, step, gpus)

    def fits(checkpointed: int) -> bool:
        _, memory = held.recomputing(checkpointed)
        return _needed_gib(memory, step) <= usable_gib

    if step.captured and not fits(sizes.blocks):
        return fewest_checkpointed(sizes, replace(step, captured=False), usable_gib, gpus=gpus)
    if fits(0):  # the first that recomputes costs what one layer holds while it does
        return 0
    fewest, most = 1, sizes.blocks
    while fewest < most:  # from there on memory falls
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if fits(middle) else (middle + 1, most)
    return fewest


def _needed_gib(memory: Sequence[GpuMemory], step: StepSettings) -> float:
    """What the fullest GPU must have free; where passes are recorded, room for that beside a pass's peak too."""
    beside_peak = RECORDING_ROOM_GIB if step.captured else 0.0
    return max(max(gib(each.total), gib(each.allocated + each.context) + beside_peak) for each in memory)


def together(copies: int) -> float:
    """How many times as fast several processes are as one."""
    return 1.0 if copies == 1 else copies * COPIES_EFFICIENCY


def candidate(
    sizes: ModelSizes,
    step: StepSettings,
    hardware: Hardware,
    tokens: int,
    *,
    gpus: int,
    accumulation: int,
    copies: int = 1,
) -> Candidate:
    """A step's memory, speed, time and price.

    Args:
        sizes: of the model.
        step: the settings.
        hardware: the GPUs.
        tokens: of the whole training.
        gpus: how many hold one copy of the model together.
        accumulation: forward passes per optimizer step.
        copies: of the model, each on `gpus` GPUs.
    """
    layers, memory = predict(sizes, step, gpus=gpus)
    if step.captured and _needed_gib(memory, step) > hardware.usable_gib:
        step = replace(step, captured=False)  # as the trainer does where a recording finds no room
        layers, memory = predict(sizes, step, gpus=gpus)
    rate = together(copies) * step.tokens / step_seconds(sizes, step, hardware.gpu or UNNAMED_GPU)
    seconds = tokens / rate + (COMPILE_S if step.compiled else 0.0)
    price = hardware.price_usd_per_hour
    return Candidate(
        blocks=step.blocks,
        accumulation=accumulation,
        checkpointed=step.checkpointed,
        layers=sizes.blocks,
        compiled=step.compiled,
        captured=step.captured,
        offloaded=step.offloaded and not sizes.tied,
        copies=copies,
        layers_per_gpu=layers,
        memory=memory,
        beside=beside(sizes, step, layers),
        seq_len_tokens=step.seq_len_tokens,
        tokens_per_s=rate,
        seconds=seconds,
        dollars=None if price is None else price * seconds / 3600,
    )


def fitting_in(hardware: Hardware, candidates: list[Candidate]) -> list[Candidate]:
    """Those that fit, the one that ends first before the others."""
    fitting = [each for each in candidates if each.peak_gib <= hardware.usable_gib]
    return sorted(fitting, key=lambda each: each.seconds)
