"""The training that runs in this process: how its processes share the GPUs, for a plan, a prediction or a cost of just that.

A process of several knows its own GPU and, by torchrun's variables, how many others there are. Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from qlora_helpers.base.config import RunConfig
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.planning import run_plan
from qlora_helpers.planning.layout import ONE, Layout, layout_of_processes


@dataclass(frozen=True)
class Running:
    """The processes of a training and what they run on.

    Attributes:
        layout: who holds what.
        machines: how many machines they are on, evenly.
    """

    layout: Layout
    machines: int = 1

    def hardware(self) -> Hardware:
        """Returns the GPUs that they use, with those of other machines, which are taken to be like this one's.

        Raises:
            UserError: this machine has none.
        """
        return replace(run_plan.this_machine(), gpus=self.layout.gpus, machines=self.machines)

    def all_gpus(self) -> Hardware:
        """Returns all GPUs of the machines that they are on.

        Raises:
            UserError: this machine has none.
        """
        here = run_plan.this_machine()
        return replace(here, gpus=here.gpus * self.machines, machines=self.machines)


def running(share: str, *, holding: int | None = None) -> Running:
    """Returns how the training in this process uses the GPUs.

    Args:
        share: the setting `train.share`.
        holding: on how many GPUs a single process holds the model; None takes all of this machine, or one where `share` says so.

    Raises:
        UserError: this machine has no GPU, and `holding` is not known.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        gpus = 1 if share == ONE else run_plan.this_machine().gpus if holding is None else max(1, holding)
        return Running(Layout(spread=gpus))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    return Running(layout_of_processes(share, processes, here), max(1, processes // here))


def of_all_processes(config: RunConfig, processes: int) -> RunConfig:
    """Returns settings that ask for as many sequences an optimizer step as so many processes take with these together.

    The settings of a run in several processes are those of each of them; a plan shares out what all of them take.
    """
    passes = config.train.gradient_accumulation_steps * processes
    return config.with_settings({"train.gradient_accumulation_steps": passes})
