"""What a run's settings lead to as they stand: memory, speed, time and price, and the smallest change where they don't fit.

`plan` looks for the best settings; here the settings are given. Owns what the trainer does with a setting that says `auto` or none.
Imports no torch; knows nothing of forms, runs or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from qlora_helpers.base.config import RunConfig, TrainConfig
from qlora_helpers.data.known import DataSize
from qlora_helpers.machine.hardware import Gpu, Hardware
from qlora_helpers.model.shapes.sizes import ModelSizes, model_sizes
from qlora_helpers.planning.candidates import (
    Candidate,
    candidate,
    embedding_places,
    fastest_in_several_processes,
    fewest_checkpointed,
    is_packed,
    may_compile,
    records,
)
from qlora_helpers.planning.fixes import cheapest_instance, smallest_change
from qlora_helpers.planning.memory import MEMORY_MARGIN
from qlora_helpers.planning.notes import SPREAD, hardware_notes, settings_notes
from qlora_helpers.planning.plan import Plan, make_plan
from qlora_helpers.planning.speed import UNNAMED_GPU, compile_pays
from qlora_helpers.planning.step_settings import StepSettings, step_settings


@dataclass(frozen=True)
class Fix:
    """A change with which the settings fit.

    Attributes:
        settings: as `--set` takes them; empty where other hardware is the mend.
        hardware: an instance that would do; empty where the settings are the mend.
        text: what it gives, for a person.
    """

    settings: tuple[str, ...]
    hardware: str
    text: str


@dataclass(frozen=True)
class Forecast:
    """What settings lead to on some hardware.

    Attributes:
        step: these very settings: memory, speed, time and price of the whole training.
        steps: optimizer steps.
        plan: what the plan would choose instead, in one process on the same hardware and data.
        several: the same in several processes (torchrun), each with a GPU, where that is faster.
        fixes: the smallest changes that fit, where the settings don't.
        notes: what a reader must know of these figures.
    """

    step: Candidate
    steps: int
    plan: Plan
    several: Candidate | None = None
    fixes: tuple[Fix, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def hardware(self) -> Hardware:
        return self.plan.hardware

    @property
    def adapter_parameters(self) -> int:
        """Trainable weights."""
        return self.plan.adapter_parameters

    @property
    def parameters(self) -> int:
        """All weights, the adapters' included."""
        return self.plan.sizes.parameters + self.plan.adapter_parameters

    @property
    def fits(self) -> bool:
        return self.step.peak_gib <= self.hardware.usable_gib

    @property
    def shortfall_gib(self) -> float:
        """GiB missing on the fullest GPU; 0 where it fits."""
        return max(0.0, self.step.peak_gib - self.hardware.usable_gib)

    @property
    def plan_is_faster(self) -> bool:
        """Whether the plan's settings fit and are worth taking: these don't fit, or are slower by more than a hundredth."""
        choice = self.plan.choice
        return choice is not None and (not self.fits or choice.seconds < 0.99 * self.step.seconds)


def look_ahead(
    config: RunConfig, shape: dict[str, Any], hardware: Hardware, size: DataSize, *, trained_share: float = 0.2
) -> Forecast:
    """What these settings lead to.

    Args:
        config: of the run.
        shape: the model's `config.json`.
        hardware: the GPUs, with their price.
        size: rows of the training data, and tokens a row.
        trained_share: of the tokens.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    steps, tokens = _work(config, shape, size)
    step = _as_set(config, shape, hardware, steps, tokens, trained_share)
    plan = make_plan(
        config.model.name,
        shape,
        hardware,
        config,
        tokens=round(tokens / config.train.epochs),
        trained_share=trained_share,
        one_process=True,
        fix=False,
    )
    several = fastest_in_several_processes(shape, hardware, config, plan.tokens, trained_share)
    if several and plan.choice and several.seconds >= plan.choice.seconds:
        several = None
    fixes = ()
    if step.peak_gib > hardware.usable_gib:
        fixes = _fixes(config, shape, plan, step, trained_share)
    return Forecast(
        step, steps, plan, several, fixes, (*hardware_notes(hardware, plan.sizes), *_notes(config, shape, hardware))
    )


def _work(config: RunConfig, shape: dict[str, Any], size: DataSize) -> tuple[int, int]:
    """Optimizer steps, and the tokens that go through the model in them: padding counts where rows are padded."""
    length, train = config.data.seq_len_tokens, config.train
    per_step = train.micro_batch_size * train.gradient_accumulation_steps
    rows = min(size.rows, config.data.train_rows or size.rows)
    an_epoch = rows * (size.tokens_per_row if is_packed(config, shape) else length)
    steps = math.ceil(train.epochs * math.ceil(math.ceil(an_epoch / length) / per_step))
    tokens = round(an_epoch * train.epochs)
    if train.max_steps is not None:
        steps, tokens = train.max_steps, train.max_steps * per_step * length
    return steps, tokens


def _as_set(
    config: RunConfig, shape: dict[str, Any], hardware: Hardware, steps: int, tokens: int, trained_share: float
) -> Candidate:
    """One process, whose layers are spread over the GPUs, with what the trainer makes of the settings."""
    train, sizes = config.train, model_sizes(shape)
    gpu = hardware.gpu or UNNAMED_GPU
    captured = hardware.gpus == 1 and records(config, shape, hardware)
    step = step_settings(config, shape, blocks=train.micro_batch_size, captured=captured, trained_share=trained_share)
    if hardware.gpus == 1:
        compiled, checkpointed = compiled_and_checkpointed(
            train,
            sizes,
            step,
            gpu,
            (1 - MEMORY_MARGIN) * hardware.usable_gib,
            passes=steps * train.gradient_accumulation_steps,
            packed=is_packed(config, shape),
        )
    else:  # the trainer plans for one card alone
        asked = sizes.blocks if train.checkpointed_layers is None else train.checkpointed_layers
        compiled = train.compile == "on" and may_compile(config, shape)
        checkpointed = asked if train.activation_checkpointing else 0
    step = replace(step, compiled=compiled, checkpointed=min(checkpointed, sizes.blocks))
    return candidate(sizes, step, hardware, tokens, gpus=hardware.gpus, accumulation=train.gradient_accumulation_steps)


def compiled_and_checkpointed(
    config: TrainConfig,
    sizes: ModelSizes,
    step: StepSettings,
    gpu: Gpu,
    usable_gib: float,
    *,
    passes: int,
    packed: bool,
) -> tuple[bool, int]:
    """Whether to compile, and how many decoder layers to recompute on one GPU: as the settings say, else as the plan does.

    Args:
        config: training settings.
        sizes: of the model.
        step: what memory and speed depend on; its `compiled` and `checkpointed` don't count.
        gpu: the card, or one like it.
        usable_gib: that the training may take of it, the CUDA context included.
        passes: forward passes of the whole training.
        packed: padded rows differ in length, and are not compiled.
    """
    if not config.fast_step:  # Trainer's own way
        return False, sizes.blocks if config.activation_checkpointing else 0
    compiled = packed and config.compile == "on"
    if config.compile == "auto":
        compiled = packed and compile_pays(sizes, step, gpu, passes)
    if not config.activation_checkpointing:
        return compiled, 0
    if config.checkpointed_layers is not None:
        return compiled, config.checkpointed_layers
    return compiled, fewest_checkpointed(sizes, replace(step, compiled=compiled), usable_gib)


def _fixes(
    config: RunConfig, shape: dict[str, Any], plan: Plan, step: Candidate, trained_share: float
) -> tuple[Fix, ...]:
    """What learns the same first: more recomputation, then fewer blocks at once; then the plan's mends, and other hardware."""
    if same := _same_learning(config, shape, plan.hardware, step, trained_share):
        return (same,)
    found = []
    if plan.choice:
        found.append(Fix(tuple(plan.choice.settings), "", repr(plan.choice)))
    elif change := smallest_change(shape, plan.hardware, config, plan.tokens, trained_share, True):
        settings, best = change
        changed = {item.partition("=")[0] for item in settings}
        rest = [item for item in best.settings if item.partition("=")[0] not in changed]
        found.append(Fix((*settings, *rest), "", repr(best)))
    if other := cheapest_instance(shape, config, trained_share):
        found.append(Fix((), other.label, other.priced))
    return tuple(found)


def _same_learning(
    config: RunConfig, shape: dict[str, Any], hardware: Hardware, step: Candidate, trained_share: float
) -> Fix | None:
    """As many blocks at once as fit with the same number an optimizer step, and as few layers recomputed as that needs.

    Where they fit only with the embedding in the host's memory, that is a part of it.
    """
    sizes, per_step = model_sizes(shape), step.blocks * step.accumulation
    places = (True,) if step.offloaded else embedding_places(sizes, config)
    for blocks in [count for count in range(step.blocks, 0, -1) if per_step % count == 0]:
        for offloaded in places:
            base = step_settings(
                config,
                shape,
                blocks=blocks,
                compiled=step.compiled,
                captured=step.captured,
                trained_share=trained_share,
            )
            base = replace(base, offloaded=offloaded)
            fewest = fewest_checkpointed(sizes, base, hardware.usable_gib, gpus=hardware.gpus)
            again = max(fewest, step.checkpointed)
            if again and not config.train.fast_step:
                again = sizes.blocks
            found = candidate(
                sizes,
                replace(base, checkpointed=again),
                hardware,
                0,
                gpus=hardware.gpus,
                accumulation=per_step // blocks,
            )
            if found.peak_gib <= hardware.usable_gib:
                settings = _changed(step, found)
                return Fix(tuple(settings), "", f"{found.peak_gib:.1f} GiB, learns the same")
    return None


def _changed(old: Candidate, new: Candidate) -> list[str]:
    """The settings that turn one way to run the training into another that learns the same."""
    settings = []
    if new.checkpointed != old.checkpointed:
        settings += ["train.activation_checkpointing=true", f"train.checkpointed_layers={new.checkpointed}"]
    if new.blocks != old.blocks:
        settings += [
            f"train.micro_batch_size={new.blocks}",
            f"train.gradient_accumulation_steps={new.accumulation}",
        ]
    if new.offloaded != old.offloaded:
        settings += [f"train.offload_embeddings={'true' if new.offloaded else 'false'}"]
    return settings


def _notes(config: RunConfig, shape: dict[str, Any], hardware: Hardware) -> list[str]:
    notes = settings_notes(config, shape)
    notes += [f"one process: {SPREAD}"] if hardware.gpus > 1 else []
    if not is_packed(config, shape):
        notes.append("each padded row is counted as long as a block: time and memory are upper limits")
    return notes
