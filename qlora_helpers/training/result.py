"""How a session of training ended, and on which machine with how much memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from qlora_helpers.base.units import gib
from qlora_helpers.runs.status import stopped_by
from qlora_helpers.training.processes import values_of_all


@dataclass(frozen=True)
class TrainResult:
    """How a session of training ended.

    Attributes:
        steps: optimizer steps done in all sessions.
        new_steps: optimizer steps of this session.
        loss, eval_loss: the last logged values, nats per trained token.
        seconds: how long this session trained.
        tokens_per_s: tokens of this session per second, without padding.
        peak_gib: most memory held by tensors on each GPU while training, of all processes; on a CPU each process's peak.
        reserved_gib: the most that PyTorch reserved on each GPU for that; empty on a CPU.
        stopped: whether a person, the budget or SIGTERM stopped it before the end; `stop_reason` says why.
        machine: the names of the GPUs it ran on, or `CPU`.
        compiled, checkpointed: whether decoder layers were compiled, and how many had activation checkpointing.
        fp8: whether frozen weights were multiplied in FP8.
        captured: whether passes were replayed from CUDA graphs.
        fast_step: the parts of the fast step, a line each; empty on the plain path.
    """

    steps: int
    new_steps: int
    loss: float | None
    eval_loss: float | None
    seconds: float
    tokens_per_s: float
    peak_gib: dict[str, float]
    stopped: bool
    machine: str
    reserved_gib: dict[str, float] = field(default_factory=dict)
    compiled: bool = False
    captured: bool = False
    fp8: bool = False
    checkpointed: int = 0
    fast_step: str = ""
    stop_reason: str = ""

    def __repr__(self) -> str:
        if self.new_steps == 0:
            return f"nothing left to do: all {self.steps} steps were done before"
        peak = ", ".join(f"{value:.2f} GiB on {name}" for name, value in self.peak_gib.items())
        end = f"stopped {stopped_by(self.stop_reason)}" if self.stopped else "finished"
        losses = f"loss {self.loss:.3f}" if self.loss is not None else "no loss logged"
        losses += f", evaluation loss {self.eval_loss:.3f}" if self.eval_loss is not None else ""
        return f"{end} after {self.steps} steps: {losses}\n{self.tokens_per_s:,.0f} tokens/s, peak {peak}"


def machine_name(device: torch.device) -> str:
    """Names what a model on this device runs on: `CPU`, or the GPUs, such as `2 x NVIDIA L4`."""
    if device.type == "cpu":
        return "CPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def reserved_memory() -> dict[str, float]:
    """Returns the most that PyTorch reserved on each GPU, GiB; empty on a CPU."""
    if not torch.cuda.is_available():
        return {}
    gpus = range(torch.cuda.device_count())
    return {f"cuda:{index}": gib(torch.cuda.max_memory_reserved(index)) for index in gpus}


def peak_memory() -> dict[str, float]:
    """Returns the most memory that tensors held on each GPU since the last reset, GiB; on a CPU the process's peak."""
    if torch.cuda.is_available():
        return {
            f"cuda:{index}": gib(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count())
        }
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return {"cpu": gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}


def of_all_processes(values: dict[str, float]) -> dict[str, float]:
    """Returns what `peak_memory` or `reserved_memory` found in each process: of several, each knows its own GPU alone.

    Args:
        values: by device, of this process.
    """
    rank, local = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK", "0")
    machine = rank // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own: dict[str, float] = {}
    for name, value in values.items():
        if name == "cpu":
            own["cpu" if rank == 0 else f"cpu of process {rank + 1}"] = value
        elif name == f"cuda:{local}":
            own[name if machine == 0 else f"{name} of machine {machine + 1}"] = value
    every = values_of_all(own)
    return values if len(every) == 1 else {name: value for each in every for name, value in each.items()}
