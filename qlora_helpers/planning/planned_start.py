"""What a start on several GPUs makes of a run's settings, worked out before it: the way, and the settings of each process.

Nobody's settings are changed here, and no GPU is looked for: `choosing` does that. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_helpers.base.config import RunConfig
from qlora_helpers.planning.layout import MEANING, ONE, Layout
from qlora_helpers.planning.memory import usable_with_margin
from qlora_helpers.planning.plan import Plan, make_plan
from qlora_helpers.planning.started import refusal, settings_to_start
from qlora_helpers.planning.workload import Workload


@dataclass(frozen=True)
class PlannedStart:
    """What a start makes of the settings.

    Attributes:
        config: settings of each process.
        layout: how the GPUs are used.
        plan: that the start follows.
        refusal: why it refuses to start; empty where it does not. Config and layout are then what holds least.
    """

    config: RunConfig
    layout: Layout
    plan: Plan
    refusal: str = ""

    def text(self, peak_gib: float | None = None) -> str:
        """Returns a line on how the work is shared.

        Args:
            peak_gib: what the fullest GPU holds, where that is known.
        """
        layout, train, hardware = self.layout, self.config.train, self.plan.hardware
        if self.refusal:
            return f"{hardware.label}: {self.refusal}"
        passes = train.gradient_accumulation_steps
        each = f"micro-batch {train.micro_batch_size} and {passes} pass{'es' * (passes != 1)} a step"
        each += " on each" if layout.processes > 1 else " in one process"
        held = "" if peak_gib is None else f", {peak_gib:.1f} GiB on the fullest"
        which = f"{layout.gpus} of {hardware.gpus} GPUs"
        return f"A start on {hardware.label} takes {layout.share} on {which}, {each}{held}: {MEANING[layout.share]}"


def plan_start(workload: Workload) -> PlannedStart:
    """Works out what a start makes of the settings on several GPUs.

    Args:
        workload: what is trained, with the settings as a person asked for them, and on what.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    config, hardware, share = workload.config, workload.hardware, workload.config.train.share
    spare = replace(hardware, usable_gib=usable_with_margin(hardware.usable_gib))
    plan = make_plan(workload.on(spare), fix=False)
    plan = replace(plan, workload=workload) if plan.choice else make_plan(workload, fix=False)
    if share == ONE:
        return PlannedStart(config, Layout(), plan)
    if choice := plan.choice:
        wanted = config.with_settings(settings_to_start(config, choice))
        return PlannedStart(wanted, choice.layout, plan, refusal(config, choice.share))
    if share == "auto" and hardware.machines == 1:
        return PlannedStart(config, Layout(spread=hardware.gpus), plan)
    least = plan.smallest
    why = refusal(config, least.share) or f"train.share={share} is refused at the start: nothing fits so"
    return PlannedStart(config.with_settings(least.settings), least.layout, plan, why)
