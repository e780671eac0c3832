"""Decides a new run's settings from its rows' lengths, its model's shape and the hardware, each with its reason.

A setting that a person has given is never changed. Reads no file and no tokenizer: lengths come measured. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Any

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.units import duration
from qlora_helpers.data.lengths import RowLengths
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.model.shapes.sizes import adapted_stacks, model_sizes
from qlora_helpers.planning.cpu_speed import cpu_seconds
from qlora_helpers.planning.decide_batch import decide_batch, sequences_an_epoch
from qlora_helpers.planning.decide_lengths import decide_lengths
from qlora_helpers.planning.decided import Decided
from qlora_helpers.planning.workload import TrainingTokens

EPOCHS = ((200, 5), (1_000, 3), (10_000, 2))  # rows below which so many epochs are taken; one from there on
CPU_EPOCHS_S = 1800.0  # on a CPU fewer epochs are taken where they would take longer than this
FEW_EPOCHS = 3  # in which rows are not learned by heart
RATES = ((5e8, 2e-3), (3e9, 5e-4))  # parameters below which this learning rate is taken; the recipe's from there on
RECIPE_RATE = 2e-4
WARMUP_SHARE, LONGEST_WARMUP = 0.05, 100
LOOKS, POINTS = 5, 50  # evaluations and checkpoints in a training; points of its curve


def decide_training(
    decided: Decided,
    lengths: RowLengths,
    shape: dict[str, Any],
    hardware: Hardware | None,
    *,
    cores: int = 1,
    known: TrainingTokens | None = None,
) -> None:
    """Decides sequence length, longest answer, adapter and training settings.

    Args:
        decided: the settings so far; gets the decisions. Model, data, form and template are settled.
        lengths: of the training rows.
        shape: the model's `config.json`.
        hardware: the GPUs; None means a CPU.
        cores: of the CPU.
        known: the data as a start on several GPUs plans for them; None takes the measured lengths.
    """
    decide_lengths(decided, lengths, shape, on_cpu=hardware is None)
    try:
        parameters = model_sizes(shape).parameters
    except ModelError:  # a shape that can't be planned may still be trained
        parameters = None
    decide_epochs(decided, lengths, None if hardware or parameters is None else shape, cores=cores)
    _decide_learning(decided, parameters, on_experts=_on_experts(decided, shape))
    decide_batch(decided, lengths, shape, hardware, parameters, known=known)
    _decide_looks(decided, lengths, shape)


def _on_experts(decided: Decided, shape: dict[str, Any]) -> bool:
    """Whether a mixture's experts are to get adapters."""
    try:
        return bool(adapted_stacks(model_sizes(shape), decided.config.adapter.target_modules))
    except ModelError:
        return False


def _decide_learning(decided: Decided, parameters: int | None, *, on_experts: bool = False) -> None:
    decided.take(
        "adapter.r", decided.config.adapter.r, "the recipe's rank; a higher one holds more, and takes more memory"
    )
    epochs = decided.config.train.epochs
    why = f"rows are seen {epochs:g} time{'s' * (epochs != 1)}: "
    if on_experts:
        decided.take("adapter.lora_dropout", 0.0, "adapters on a mixture's experts have no dropout")
    elif epochs <= FEW_EPOCHS:
        decided.take("adapter.lora_dropout", 0.0, f"{why}too seldom to be learned by heart, and dropout takes time")
    else:
        decided.take("adapter.lora_dropout", 0.05, f"{why}dropout works against learning them by heart")
    rate = next((rate for most, rate in RATES if parameters is not None and parameters < most), RECIPE_RATE)
    size = "whose size is not known" if parameters is None else f"of {_short(parameters)} parameters"
    decided.take("train.learning_rate", rate, f"for a model {size}; smaller ones take more")


def decide_epochs(decided: Decided, lengths: RowLengths, cpu_shape: dict[str, Any] | None, *, cores: int) -> None:
    """Decides the epochs by the number of rows; on a CPU no more than fit into half an hour, but at least one.

    Args:
        decided: the settings so far.
        lengths: of the training rows.
        cpu_shape: the `config.json` of a model that trains on a CPU; None for a GPU, or where time can't be estimated.
        cores: of the CPU.
    """
    epochs = next((epochs for below, epochs in EPOCHS if lengths.rows < below), 1)
    why = f"{lengths.rows:,} training rows: the fewer there are, the more often they are seen"
    if cpu_shape is not None and epochs > 1:
        seconds = cpu_seconds(model_sizes(cpu_shape), lengths.tokens, lengths.trained_share, cores)
        fitting = max(1, min(epochs, int(CPU_EPOCHS_S / max(seconds, 1e-9))))
        if fitting < epochs:
            why = f"one takes about {duration(seconds)} on this CPU; it would be {epochs} on a GPU"
            epochs = fitting
    decided.take("train.epochs", float(epochs), why)


def _decide_looks(decided: Decided, lengths: RowLengths, shape: dict[str, Any]) -> None:
    train = decided.config.train
    sequences = sequences_an_epoch(decided.config, lengths, shape)
    batches = math.ceil(sequences / train.micro_batch_size)
    steps = math.ceil(train.epochs * math.ceil(batches / train.gradient_accumulation_steps))
    steps = steps if train.max_steps is None else train.max_steps
    about = f"about {steps:,} steps in all"
    fifth = max(1, math.ceil(steps / LOOKS))
    warmup = min(LONGEST_WARMUP, int(steps * WARMUP_SHARE))
    decided.take("train.warmup_steps", warmup, f"{about}: the learning rate rises in the first {WARMUP_SHARE:.0%}")
    decided.take("train.eval_steps", fifth, f"{about}: the evaluation loss {LOOKS} times")
    decided.take("train.save_steps", fifth, f"{about}: a checkpoint as often")
    decided.take(
        "train.logging_steps", max(1, math.ceil(steps / POINTS)), f"{about}: up to {POINTS} points in the curve"
    )


def _short(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.0f} million"
