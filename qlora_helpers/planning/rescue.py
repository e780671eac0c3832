"""What should fit where a training ran out of memory: settings for the same processes, and other ways to use the GPUs.

By arithmetic, for the layout over GPUs that this training has: copies, shards, or layers spread in one process. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.model.shapes.lookup import find_shape
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning import run_plan
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.memory import CONTEXT_BYTES
from qlora_helpers.planning.running import of_all_processes, running

# Of what the failed settings were predicted to hold: the next ones must differ by more than the prediction's error
NEXT_SHARE = 0.9


@dataclass(frozen=True)
class Failure:
    """What is known of an error, read before its frames are cleared.

    Attributes:
        where: the part of the step, such as `forward of layer 3 of 32`.
        step: optimizer steps done.
        checkpointed, compiled: of the decoder layers; None where no training was open.
        usable_gib: what this process could have of its card, its own included; None on a CPU. Other programs may hold a part.
    """

    where: str
    step: int | None = None
    checkpointed: int | None = None
    compiled: bool = False
    usable_gib: float | None = None


@dataclass(frozen=True)
class Rescue:
    """What should fit where a training ran out of memory.

    Attributes:
        candidates: settings for the same processes, fastest first.
        other_way: another way to use the GPUs, or more of them; empty where there is none.
        fixes: where there are no candidates, whatever else would fit; the other way is the first of them.
        most_gib: what each GPU may be planned to hold from now on.
        card_gib: what this machine's GPUs can hold.
        processes: that the training runs in.
    """

    candidates: tuple[Candidate, ...] = ()
    other_way: str = ""
    fixes: tuple[str, ...] = ()
    most_gib: float | None = None
    card_gib: float | None = None
    processes: int = 1

    @property
    def how(self) -> str:
        """How to go on with the candidates."""
        if self.processes == 1:
            return "workflow.retry(run) continues from the last checkpoint with the first of them."
        return (
            f"ql.start(run), or `qlora launch`, continues from the last checkpoint with a plan of at most {self.most_gib:.1f} GiB "
            "on each GPU."
        )


def find_rescue(config: RunConfig, failure: Failure) -> Rescue:
    """Returns what should fit where a run's settings did not.

    Args:
        config: of the run, as each process of this training has it.
        failure: where it ran out of memory.
    """
    try:
        here = running(config.train.share)
        hardware, layout = here.hardware(), here.layout
        checkpointed = failure.checkpointed
        if checkpointed is None:
            layers = model_sizes(find_shape(config.model)).layers
            checkpointed = layers if config.train.activation_checkpointing else 0
        held: Any = run_plan.predicted_step(
            config,
            hardware=hardware,
            compiled=failure.compiled,
            checkpointed=checkpointed,
            trained_share=run_plan.trained_share(config.data),
            layout=layout,
        )["reserved_gib"]
        usable = hardware.usable_gib if failure.usable_gib is None else min(hardware.usable_gib, failure.usable_gib)
        most = min(usable, NEXT_SHARE * max(held.values()) + gib(CONTEXT_BYTES))
        asked = of_all_processes(config, layout.processes)
        plan = run_plan.plan_run(asked, hardware=dataclasses.replace(hardware, usable_gib=most), only=layout)
        other = _other_layout(asked, dataclasses.replace(here.all_gpus(), usable_gib=most), layout)
    except UserError:  # no GPU, or a shape that can't be planned
        return Rescue()
    candidates = (plan.choice, *plan.alternatives) if plan.choice else ()
    fixes = (other, *plan.fixes) if other else plan.fixes
    return Rescue(candidates, other, () if candidates else fixes, most, hardware.usable_gib, layout.processes)


def _other_layout(asked: RunConfig, hardware: Hardware, layout: Layout) -> str:
    """Returns how several processes could use the GPUs otherwise, such as in more shards; empty where nothing else fits."""
    if hardware.gpus == 1:
        return ""
    asked = asked.with_settings({"train.share": "auto"})
    best = run_plan.plan_run(asked, hardware=hardware, fix=False).choice
    if best is None or best.processes == 1 or best.layout == layout:
        return ""
    return f"ql.start(run, gpus={best.layout.gpus // hardware.machines}, share={best.share!r}): {best!r}"
