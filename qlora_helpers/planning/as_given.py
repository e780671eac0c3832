"""The settings of a run as they are on some hardware, with what the trainer and a start make of `auto` and of several GPUs.

Imports no torch; knows nothing of forms, runs or files.
"""

from __future__ import annotations

from dataclasses import replace

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.machine.hardware import Gpu
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.candidates import candidate, fewest_checkpointed
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.memory import usable_with_margin
from qlora_helpers.planning.plan import Plan
from qlora_helpers.planning.planned_start import plan_start
from qlora_helpers.planning.speed import compile_pays
from qlora_helpers.planning.step_settings import StepSettings
from qlora_helpers.planning.workload import Workload


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


def as_started(workload: Workload, steps: int) -> tuple[Candidate, Plan]:
    """What a start makes of the settings on several GPUs, with the plan that it follows.

    Args:
        workload: what is trained, with the settings as a person asked for them, and on what.
        steps: optimizer steps.
    """
    found = plan_start(workload)
    if not found.plan.choice and found.refusal:
        return found.plan.smallest, found.plan
    return settings_as_given(replace(workload, config=found.config), steps, found.layout), found.plan
