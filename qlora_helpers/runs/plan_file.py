"""A run's `plan.json`: what its last training measured, what was predicted for the same settings, and what came of it later."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_object, read_record
from qlora_helpers.runs.folder import Run

NEXT_STEP = "Delete it and train again to measure anew."


@dataclass(frozen=True)
class Measured:
    """What a training session measured.

    Attributes:
        weights_gib, peak_gib, reserved_gib: by device: the loaded weights, the peak held by tensors, the peak that the
            allocator reserved.
        seconds: of the session, evaluations included.
        tokens_per_s: trained tokens a second, without padding.
        steps: optimizer steps of the whole run.
        trainable_parameters, parameters, published_parameters: of the adapters, of the model with them, and as published.
        machine: the GPUs' names, or `CPU`.
        fast_step: what the fast step's proofs found, line by line.
        versions: of the packages.
    """

    peak_gib: dict[str, float]
    seconds: float
    tokens_per_s: float
    steps: int
    trainable_parameters: int
    parameters: int
    published_parameters: int
    machine: str
    versions: dict[str, str]
    weights_gib: dict[str, float] = field(default_factory=dict)
    reserved_gib: dict[str, float] = field(default_factory=dict)
    fast_step: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predicted:
    """What was predicted for the settings that were measured: GiB by device, and trained tokens a second."""

    tokens_per_s: float
    allocated_gib: dict[str, float] = field(default_factory=dict)
    reserved_gib: dict[str, float] = field(default_factory=dict)
    extrapolated: bool = False


@dataclass(frozen=True)
class Reloaded:
    """How the model that was loaded again from disk compares with the one in memory (`evaluation.comparison.ReloadCheck`)."""

    prompts: int
    largest_difference: float | None
    same_answers: int


@dataclass(frozen=True)
class MemoryFailure:
    """Where the run was last out of memory, and what should fit.

    Attributes:
        where: the part of the step.
        step: optimizer steps done.
        next: settings for the same processes, fastest first, each as `--set` takes them.
        most_gib: what each GPU may be planned to hold from then on; None where nothing could be planned.
        card_gib: what the GPUs on which it ran out can hold.
    """

    where: str
    step: int | None = None
    next: tuple[tuple[str, ...], ...] = ()
    most_gib: float | None = None
    card_gib: float | None = None


@dataclass(frozen=True)
class Launched:
    """How the run was last started on several GPUs or processes.

    Attributes:
        share: the way in which they share the work, as `train.share` has it.
        processes, gpus: how many; no GPUs on a CPU.
        settings: what was set for that, by the settings' full names.
        before: what these were before, so that another number of GPUs can be given the same work.
        why: why this way was taken, for a reader.
    """

    share: str
    processes: int
    gpus: int
    settings: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class DecidedSetting:
    """A setting that was decided when the run was made, with its reason."""

    setting: str
    value: Any
    reason: str


@dataclass(frozen=True)
class PlanFile:
    """What `plan.json` holds; None for what has not happened yet."""

    measured: Measured | None = None
    predicted: Predicted | None = None
    reload: Reloaded | None = None
    out_of_memory: MemoryFailure | None = None
    demo_seconds: float | None = None
    decisions: tuple[DecidedSetting, ...] = ()
    launched: Launched | None = None


def read_plan(run: Run) -> PlanFile:
    """Reads the run's `plan.json`; a run without one has an empty plan.

    Raises:
        RunError: the file is damaged.
    """
    return read_record(run.plan_path, PlanFile, next_step=NEXT_STEP) if run.plan_path.exists() else PlanFile()


def add_to_plan(run: Run, **values: Any) -> None:
    """Writes values into the run's `plan.json` and keeps its other entries.

    Raises:
        RunError: the file is damaged or can't be written.
    """
    old = read_object(run.plan_path, next_step=NEXT_STEP) if run.plan_path.exists() else {}
    write_json(run.plan_path, old | values)
