"""What a run's settings lead to as they are: memory, speed, time and price, and the smallest change where they don't fit.

`plan` looks for the best settings; here the settings are given. What the trainer and a start make of
them is `as_given`'s. Imports no torch; knows nothing of forms, runs or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_helpers.base.config import RunConfig
from qlora_helpers.data.known import DataSize
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.planning.as_given import as_started, settings_as_given
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.candidates import candidate, fewest_checkpointed
from qlora_helpers.planning.fixes import cheapest_instance, smallest_change
from qlora_helpers.planning.fp8 import fp8_notes
from qlora_helpers.planning.notes import SPREAD, hardware_notes, model_notes, settings_notes
from qlora_helpers.planning.plan import Plan, make_plan
from qlora_helpers.planning.started import CHECKPOINTED, CHECKPOINTING, refusal
from qlora_helpers.planning.step_settings import sequences_per_step
from qlora_helpers.planning.workload import Workload

LEFT_OPEN = (f"{CHECKPOINTING}=true", f"{CHECKPOINTED}=none", "train.compile=auto")
"""Leaves it to a start and its processes how layers are computed."""
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
        step: memory, speed, time and price of the whole training with these very settings; on several GPUs in the way, and with
            the micro-batch and passes, that a start takes for them.
        steps: optimizer steps.
        plan: what would be chosen instead on the same hardware and data; on several GPUs what a start follows.
        started: whether a start chooses how several GPUs share the work.
        spread: where that is in several processes, the same settings in a single one, whose layers are spread over the GPUs.
        fixes: the smallest changes that fit, where the settings don't.
        notes: what a reader must know of these figures.
    """

    step: Candidate
    steps: int
    plan: Plan
    started: bool = False
    spread: Candidate | None = None
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
        """Whether the plan is worth taking: the settings don't fit, or take more than a hundredth longer than the plan.

        Never where a start takes the plan's way by itself.
        """
        choice = None if self.started else self.plan.choice
        return choice is not None and (not self.fits or choice.seconds < WORTH_TAKING * self.step.seconds)


def make_forecast(workload: Workload, steps: int) -> Forecast:
    """Works out what these very settings lead to: on several GPUs in the way that a start takes, unless `workload` has one process.

    Args:
        workload: what is trained, and on what.
        steps: optimizer steps of the whole training, as `steps_and_tokens` counts them.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    hardware = workload.hardware
    started, spread = hardware.gpus > 1 and not workload.one_process, None
    if started:
        step, plan = as_started(workload, steps)
        if step.processes > 1 and hardware.machines == 1:
            spread = settings_as_given(workload, steps)
    else:
        workload = replace(workload, one_process=True)
        step, plan = settings_as_given(workload, steps), make_plan(workload, fix=False)
    fixes: tuple[Fix, ...] = ()
    if step.peak_gib > hardware.usable_gib:
        fixes = _fixes_of_a_start(plan, steps) if started else _fixes(plan, step, steps)
    notes = *hardware_notes(hardware), *model_notes(workload.sizes), *_notes(workload, step)
    notes += tuple(fp8_notes(workload.config.train, workload.gpu, step.fp8))
    return Forecast(step, steps, plan, started, spread, fixes, notes)


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


def _fixes_of_a_start(plan: Plan, steps: int) -> tuple[Fix, ...]:
    """Lists fixes of what a start makes of the settings: it shares the work out itself, so they name nothing of that."""
    workload, found = plan.workload, []
    change = None if plan.choice else smallest_change(workload)
    if plan.choice or change:
        needed = tuple(change[0]) if change else ()
        for more in ((), LEFT_OPEN):
            settings = *needed, *changed_settings(workload.config, more)
            changed = workload.with_settings(settings)
            step, _ = as_started(changed, steps)
            if settings and step.peak_gib <= workload.hardware.usable_gib:
                learns = "" if needed else ", learns the same"
                found.append(Fix(settings, "", f"{step.peak_gib:.1f} GiB{learns}"))
                break
    if not plan.choice and (other := cheapest_instance(workload)):
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


def _notes(workload: Workload, step: Candidate) -> list[str]:
    notes = settings_notes(workload)
    notes += [f"one process: {SPREAD}"] if step.layout.spread > 1 else []
    if not workload.one_process and workload.hardware.gpus > 1 and (refused := refusal(workload.config, step.share)):
        notes.append(refused)
    if not workload.packed:
        notes.append("each padded row is counted at the full sequence length: time and memory are upper limits")
    return notes
