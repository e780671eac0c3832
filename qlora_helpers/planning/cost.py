"""What a training will take on this machine, in one line before it starts: rows, tokens, epochs, steps, time and price.

Imports no torch; reads no file.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.config import RunConfig, TrainConfig
from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.units import duration
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.as_given import settings_as_given
from qlora_helpers.planning.cpu_speed import cpu_seconds, cpu_threads
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.running import running
from qlora_helpers.planning.step_settings import is_packed
from qlora_helpers.planning.workload import Workload
from qlora_helpers.runs.folder import Run

if TYPE_CHECKING:
    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.model.loading import LoadedModel

LONG_S = 3600.0  # from here on a CPU's time is said first
FEWER = "fewer: data.train_rows=N, train.epochs=N or train.max_steps=N"


@dataclass(frozen=True)
class TrainingCost:
    """What a training takes.

    Attributes:
        rows: training rows.
        tokens: of the rows in all epochs, without padding.
        epochs, steps: of the whole training; `done` of the steps are behind it.
        seconds: for the steps that are left, evaluations on a GPU left out; None where it can't be estimated.
        usd_per_hour: of this machine; None where it is not known.
        machine: such as `this CPU (2 cores)` or `H100`.
        on_cpu: whether that is a CPU.
        padded: whether rows are padded: the time is then that of rows as long as a sequence, an upper limit.
        peak_gib: what the fullest GPU holds at most; None on a CPU, and where it can't be estimated.
        usable_gib: what each GPU has; None on a CPU.
    """

    rows: int
    tokens: int
    epochs: float
    steps: int
    done: int
    seconds: float | None
    usd_per_hour: float | None
    machine: str
    on_cpu: bool
    padded: bool = False
    peak_gib: float | None = None
    usable_gib: float | None = None

    @property
    def is_too_large(self) -> bool:
        """Whether it needs more memory than a GPU has; False where that is not known."""
        return self.peak_gib is not None and self.usable_gib is not None and self.peak_gib > self.usable_gib

    @property
    def dollars(self) -> float | None:
        """Price of the time that is left, USD."""
        known = self.usd_per_hour is not None and self.seconds is not None
        return self.usd_per_hour * self.seconds / 3600 if known else None  # type: ignore[operator]

    @property
    def is_long(self) -> bool:
        """Whether it takes hours on a CPU."""
        return self.on_cpu and self.seconds is not None and self.seconds >= LONG_S

    def __str__(self) -> str:
        epochs = f"{self.epochs:.3g} epoch{'s' * (self.epochs != 1)}"
        steps = f"{self.steps:,} steps" + (f" ({self.done:,} done)" if self.done else "")
        about = "at most" if self.padded else "about"
        time = "time not known" if self.seconds is None else f"{about} {duration(self.seconds)}"
        price = "price not known (train.usd_per_hour)"
        if self.usd_per_hour is not None:
            price = f"at ${self.usd_per_hour:,.4g} an hour" if self.dollars is None else f"${self.dollars:,.2f}"
        first = f"This takes hours on a CPU, {time}. " if self.is_long else ""
        return (
            f"{first}Training: {self.rows:,} rows, {self.tokens:,} tokens, {epochs}, {steps}: "
            f"{time} on {self.machine}, {price}; {FEWER}"
        )


def cost_of_run(run: Run, loaded: LoadedModel, data: PreparedData, *, done: int | None = None) -> TrainingCost:
    """Estimates what a run's training takes on this machine: rows, tokens, epochs, steps, time and price.

    Args:
        run: the run; the steps that it has done don't count in the time.
        loaded: the model, whose device counts.
        data: the run's prepared data.
        done: the step that training goes on from, where it isn't the one that the run has reached.
    """
    status, config, hardware = run.status(), run.config(), None
    holding = sum(name.startswith("cuda") for name in loaded.audit.gib_by_device)  # of several processes one
    here = running(config.train.share, holding=holding)
    if loaded.model.device.type == "cuda":
        with contextlib.suppress(UserError):  # a card that does not report its memory
            hardware = here.hardware()
    return training_cost(
        config,
        loaded.shape,
        rows=data.report.rows,
        tokens=data.report.tokens,
        sequences=data.report.sequences,
        trained_share=data.report.trained_tokens / max(1, data.report.tokens),
        hardware=hardware,
        cores=cpu_threads(),
        usd_per_hour=status.usd_per_hour,
        done=status.step if done is None else done,
        layout=here.layout,
        packed=data.packed,
    )


def training_cost(
    config: RunConfig,
    shape: dict[str, Any],
    *,
    rows: int,
    tokens: int,
    sequences: int,
    trained_share: float,
    hardware: Hardware | None,
    cores: int,
    usd_per_hour: float | None = None,
    done: int = 0,
    layout: Layout | None = None,
    packed: bool | None = None,
) -> TrainingCost:
    """Estimates what a training takes with these settings.

    Args:
        config: of the run.
        shape: the model's `config.json`.
        rows, tokens, sequences: of an epoch, without padding.
        trained_share: share of the tokens that count in the loss.
        hardware: the GPUs that train; None means a CPU.
        cores: of the CPU that each process computes with.
        usd_per_hour: of this machine.
        done: optimizer steps that are behind it.
        layout: how processes and GPUs share the model; None means one process whose layers are spread over the GPUs.
        packed: whether rows are packed; None asks the settings and the shape.
    """
    packed = is_packed(config, shape) if packed is None else packed
    layout = layout or Layout(spread=hardware.gpus if hardware else 1)
    cores *= layout.processes
    epochs, steps = _epochs_and_steps(config.train, sequences, layout.processes)
    computed = (tokens if packed else sequences * config.data.seq_len_tokens) * epochs  # padding included
    seconds: float | None
    peak_gib: float | None = None
    try:
        if hardware is None:
            checkpointed = config.train.activation_checkpointing and config.train.checkpointed_layers != 0
            seconds = cpu_seconds(model_sizes(shape), computed, trained_share, cores, checkpointed=checkpointed)
        else:
            workload = Workload(config, shape, hardware, round(computed), trained_share)
            given = settings_as_given(workload, steps, layout)
            seconds, peak_gib = given.seconds, given.peak_gib
    except ModelError:  # a shape that can't be planned
        seconds = None
    left = max(0, steps - done) / max(1, steps)
    return TrainingCost(
        rows,
        round(tokens * epochs),
        epochs,
        steps,
        done,
        None if seconds is None else seconds * left,
        usd_per_hour,
        machine=f"this CPU ({cores} core{'s' * (cores != 1)})" if hardware is None else hardware.label,
        on_cpu=hardware is None,
        padded=not packed,
        peak_gib=peak_gib,
        usable_gib=None if hardware is None else hardware.usable_gib,
    )


def _epochs_and_steps(train: TrainConfig, sequences: int, processes: int) -> tuple[float, int]:
    """Returns epochs and optimizer steps of a training, counted as the trainer does: a last, smaller batch is a step."""
    batches = math.ceil(sequences / processes / train.micro_batch_size)
    steps_per_epoch = max(1, math.ceil(batches / train.gradient_accumulation_steps))
    if train.max_steps is None:
        return train.epochs, math.ceil(train.epochs * steps_per_epoch)
    return train.max_steps / steps_per_epoch, train.max_steps
