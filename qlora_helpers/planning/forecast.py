"""What a run's settings lead to as they are: memory, speed, time and price, and the smallest change where they don't fit.

`plan` looks for the best settings; here the settings are given. Owns what the trainer does with a setting that is `auto` or none.
Imports no torch; knows nothing of forms, runs or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_helpers.base.config import RunConfig, TrainConfig
from qlora_helpers.data.known import DataSize
from qlora_helpers.machine.hardware import Gpu, Hardware
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.candidates import candidate, fastest_in_several_processes, fewest_checkpointed
from qlora_helpers.planning.fixes import cheapest_instance, smallest_change
from qlora_helpers.planning.fp8 import fp8_notes
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.memory import usable_with_margin
from qlora_helpers.planning.notes import SPREAD, hardware_notes, model_notes, settings_notes
from qlora_helpers.planning.plan import Plan, make_plan
from qlora_helpers.planning.speed import compile_pays
from qlora_helpers.planning.step_settings import StepSettings, sequences_per_step
from qlora_helpers.planning.workload import Workload

WORTH_TAKING = 0.99  # of the time that the settings take; a plan that saves less is not offered


@dataclass(frozen=True)
class Fix:
    """A change with which the settings fit.

    Attributes:
        settings: as `--set` takes them; empty where the fix is other hardware.
        hardware: an instance that would do; empty where the fix is a change of the settings.
        text: what it gives, for a reader.
    """

    settings: tuple[str, ...]
    hardware: str
    text: str


@dataclass(frozen=True)
class Forecast:
    """What settings lead to on some hardware.

    Attributes:
        step: memory, speed, time and price of the whole training with these very settings.
        steps: optimizer steps.
        plan: what would be chosen instead, in one process on the same hardware and data.
        several: the fastest in several processes, each with a GPU, where that is faster than the plan.
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
        """The GPUs that the forecast is for."""
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
        """Whether these very settings fit."""
        return self.step.peak_gib <= self.hardware.usable_gib

    @property
    def shortfall_gib(self) -> float:
        """GiB missing on the fullest GPU; 0 where it fits."""
        return max(0.0, self.step.peak_gib - self.hardware.usable_gib)

    @property
    def plan_is_faster(self) -> bool:
        """Whether the plan is worth taking: the settings don't fit, or take more than a hundredth longer than the plan."""
        choice = self.plan.choice
        return choice is not None and (not self.fits or choice.seconds < WORTH_TAKING * self.step.seconds)


def make_forecast(workload: Workload, steps: int) -> Forecast:
    """Works out what these very settings lead to, in one process.

    Args:
        workload: what is trained, and on what.
        steps: optimizer steps of the whole training, as `steps_and_tokens` counts them.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    workload = replace(workload, one_process=True)
    step = settings_as_given(workload, steps)
    plan = make_plan(workload, fix=False)
    several = fastest_in_several_processes(workload)
    if several and plan.choice and several.seconds >= plan.choice.seconds:
        several = None
    fixes = _fixes(plan, step, steps) if step.peak_gib > workload.hardware.usable_gib else ()
    notes = *hardware_notes(workload.hardware), *model_notes(workload.sizes), *_notes(workload)
    notes += tuple(fp8_notes(workload.config.train, workload.gpu, step.fp8))
    return Forecast(step, steps, plan, several, fixes, notes)


def steps_and_tokens(config: RunConfig, size: DataSize, *, packed: bool) -> tuple[int, int]:
    """Counts optimizer steps and the tokens that go through the model in them; padding counts where rows are padded.

    Args:
        config: of the run.
        size: rows of the training data, and tokens a row.
        packed: whether rows are packed.
    """
    length, train = config.data.seq_len_tokens, config.train
    per_step = sequences_per_step(train)
    rows = min(size.rows, config.data.most_rows("train") or size.rows)
    an_epoch = rows * (size.tokens_per_row if packed else length)
    steps = math.ceil(train.epochs * math.ceil(math.ceil(an_epoch / length) / per_step))
    tokens = round(an_epoch * train.epochs)
    if train.max_steps is not None:
        steps, tokens = train.max_steps, train.max_steps * per_step * length
    return steps, tokens


def settings_as_given(workload: Workload, steps: int, layout: Layout | None = None) -> Candidate:
    """The settings as they are, with what the trainer makes of `auto`.

    Args:
        workload: what is trained, with the settings of each process, and on what.
        steps: optimizer steps.
        layout: how the GPUs are used; None means one process whose layers are spread over them.
    """
    train, sizes, hardware = workload.config.train, workload.sizes, workload.hardware
    layout = layout or Layout(spread=hardware.gpus)
    captured = layout.shards == layout.spread == 1 and workload.may_capture
    step = workload.step(captured=captured, copies=layout.copies, shards=layout.shards)
    if layout.spread == 1:
        compiled, checkpointed = compiled_and_checkpointed(
            train,
            sizes,
            step,
            workload.gpu,
            usable_with_margin(hardware.usable_gib),
            passes=steps * train.gradient_accumulation_steps,
            packed=workload.packed,
        )
    else:  # the trainer plans for one card alone
        asked = sizes.layers if train.checkpointed_layers is None else train.checkpointed_layers
        compiled = train.compile == "on" and workload.may_compile
        checkpointed = asked if train.activation_checkpointing else 0
    step = replace(step, compiled=compiled, checkpointed=min(checkpointed, sizes.layers))
    return candidate(workload, step, gpus=layout.spread, gradient_accumulation_steps=train.gradient_accumulation_steps)


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
    """Decides whether to compile and how many decoder layers to checkpoint on one GPU: as the settings say, else by arithmetic.

    Args:
        config: training settings.
        sizes: of the model.
        step: what memory and speed depend on; its `compiled` and `checkpointed` don't count.
        gpu: the card, or one like it.
        usable_gib: what the training may take of it, the CUDA context included.
        passes: forward passes of the whole training.
        packed: whether rows are packed; padded rows differ in length, and are not compiled.
    """
    if not config.fast_step:  # Trainer's own way
        return False, sizes.layers if config.activation_checkpointing else 0
    compiled = packed and config.compile == "on"
    if config.compile == "auto":
        compiled = packed and compile_pays(sizes, step, gpu, passes)
    if not config.activation_checkpointing:
        return compiled, 0
    if config.checkpointed_layers is not None:
        return compiled, config.checkpointed_layers
    return compiled, fewest_checkpointed(sizes, replace(step, compiled=compiled), usable_gib)


def _fixes(plan: Plan, step: Candidate, steps: int) -> tuple[Fix, ...]:
    """Lists fixes: one that learns the same where there is one, else the plan or its smallest change, and other hardware.

    Each names only settings that it changes.
    """
    workload = plan.workload
    if same := _same_learning(workload, step):
        return (same,)
    found = []
    if plan.choice:
        found.append(Fix(changed_settings(workload.config, plan.choice.settings), "", repr(plan.choice)))
    elif change := smallest_change(workload):
        settings, best = change
        found.append(_least_fix(workload, settings, best, steps))
    if other := cheapest_instance(workload):
        found.append(Fix((), other.label, other.priced))
    return tuple(found)


def _least_fix(workload: Workload, settings: list[str], best: Candidate, steps: int) -> Fix:
    """Returns a change with no more settings besides than it needs to fit, or else with those of the best way to run it."""
    changed = workload.with_settings(settings)
    step = settings_as_given(changed, steps)
    if step.peak_gib <= workload.hardware.usable_gib:
        return Fix(tuple(settings), "", f"{step.peak_gib:.1f} GiB")
    if same := _same_learning(changed, step):
        return Fix((*settings, *same.settings), "", same.text.partition(",")[0])
    names = {item.partition("=")[0] for item in settings}
    rest = [item for item in best.settings if item.partition("=")[0] not in names]
    return Fix((*settings, *changed_settings(changed.config, rest)), "", repr(best))


def changed_settings(config: RunConfig, settings: Sequence[str]) -> tuple[str, ...]:
    """Returns the settings, in the form of `--set`, that a configuration does not have already."""
    after = config.with_settings(list(settings)).to_dict()
    before = config.to_dict()

    def differs(name: str) -> bool:
        section, _, key = name.partition(".")
        return bool(before[section][key] != after[section][key])

    return tuple(item for item in settings if differs(item.partition("=")[0]))


def _same_learning(workload: Workload, step: Candidate) -> Fix | None:
    """Finds the largest micro-batch that fits with as many sequences an optimizer step, and as few checkpointed layers.

    Where it fits only with the embedding in the host's memory, that is a part of the fix.
    """
    hardware = workload.hardware
    per_step = step.micro_batch_size * step.gradient_accumulation_steps
    places = (True,) if step.offloaded else workload.embedding_places
    for size in [count for count in range(step.micro_batch_size, 0, -1) if per_step % count == 0]:
        for offloaded in places:
            base = replace(step.step, micro_batch_size=size, offloaded=offloaded)
            fewest = fewest_checkpointed(workload.sizes, base, hardware.usable_gib, gpus=hardware.gpus)
            again = max(fewest, step.checkpointed)
            if again and not workload.config.train.fast_step:
                again = workload.sizes.layers
            found = candidate(
                workload,
                replace(base, checkpointed=again),
                gpus=hardware.gpus,
                gradient_accumulation_steps=per_step // size,
            )
            if found.peak_gib <= hardware.usable_gib:
                settings = _changed(step, found)
                return Fix(tuple(settings), "", f"{found.peak_gib:.1f} GiB, learns the same")
    return None


def _changed(old: Candidate, new: Candidate) -> list[str]:
    """Lists the settings that turn one way to run the training into another that learns the same."""
    settings = []
    if new.checkpointed != old.checkpointed:
        settings += ["train.activation_checkpointing=true", f"train.checkpointed_layers={new.checkpointed}"]
    if new.micro_batch_size != old.micro_batch_size:
        settings += [
            f"train.micro_batch_size={new.micro_batch_size}",
            f"train.gradient_accumulation_steps={new.gradient_accumulation_steps}",
        ]
    if new.offloaded != old.offloaded:
        settings += [f"train.offload_embeddings={'true' if new.offloaded else 'false'}"]
    return settings


def _notes(workload: Workload) -> list[str]:
    notes = settings_notes(workload)
    notes += [f"one process: {SPREAD}"] if workload.hardware.gpus > 1 else []
    if not workload.packed:
        notes.append("each padded row is counted at the full sequence length: time and memory are upper limits")
    return notes
