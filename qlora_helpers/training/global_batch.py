"""Keeps the order of the data where a run is resumed with another number of processes.

An optimizer step takes so many packed sequences: those of a micro-batch, times the accumulated passes, times the processes. Trainer
finds its place in the data by counting steps, so a session with another number of processes must take as many sequences a step as
the one before. It then accumulates more or fewer passes; which sequences a step sees, and in which order, stays the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.records import read_record

FILE = "processes.json"


@dataclass(frozen=True)
class Processes:
    """Who took part in the session that wrote a checkpoint.

    Attributes:
        processes: how many.
        sequences: that an optimizer step took in all of them together.
    """

    processes: int
    sequences: int

    @property
    def is_plausible(self) -> bool:
        """Whether anything can have been trained so."""
        return self.processes >= 1 and self.sequences >= self.processes


def sequences_per_step(config: TrainConfig, processes: int) -> int:
    """Returns how many sequences an optimizer step takes."""
    return config.micro_batch_size * config.gradient_accumulation_steps * processes


def write_processes(checkpoint: Path, taking_part: Processes) -> None:
    """Writes into a checkpoint who took part in the session."""
    write_json(checkpoint / FILE, asdict(taking_part))


def with_same_sequences(config: TrainConfig, checkpoint: Path | None, processes: int) -> TrainConfig:
    """Returns settings with which this many processes take as many sequences a step as those that wrote a checkpoint.

    With the same number of processes the settings stay as they are, also where a person has changed them.

    Args:
        config: the run's settings.
        checkpoint: that the session goes on from; None where it begins.
        processes: of this session.

    Raises:
        RunError: no number of accumulated passes gives as many.
    """
    path = None if checkpoint is None else checkpoint / FILE
    if path is None or not path.is_file():  # of an earlier version
        return config
    before = read_record(path, Processes)
    if processes == before.processes or sequences_per_step(config, processes) == before.sequences:
        return config
    at_once = config.micro_batch_size * processes
    if before.sequences % at_once:
        raise RunError(
            f"the run trained with {before.processes} processes, and can't go on with {processes} in the same order of its data",
            expected=f"micro_batch_size times processes that divides {before.sequences} sequences a step",
            got=f"{config.micro_batch_size} x {processes}",
            next_step="Set train.micro_batch_size=1, or take another number of processes.",
        )
    return replace(config, gradient_accumulation_steps=before.sequences // at_once)
