"""The fastest settings that fit, their time and price, and the next best: by arithmetic, before a byte is downloaded.

Chooses among `candidates`; where nothing fits, it says what would. Imports no torch; knows nothing of runs on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from shlex import quote
from typing import Any

from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.candidates import all_candidates, fitting_candidates
from qlora_helpers.planning.fixes import can_fit, cheapest_instance, smallest_change
from qlora_helpers.planning.notes import plan_notes
from qlora_helpers.planning.ways import Way, find_ways, reason, simplest_of_the_fastest, ways_table
from qlora_helpers.planning.workload import Workload

DETAIL_ROWS = {
    "activations_kept": "(activations, none checkpointed)",
    "activations_checkpointed": "(activations, all checkpointed)",
    "logits": "(logits in the loss)",
}
"""Rows below the sum that are not a part of it."""


@dataclass(frozen=True)
class Plan(Tabular):
    """What fits, how fast it is, and what to change where nothing does.

    Attributes:
        workload: what is trained, and on what.
        choice: the fastest that fits, or None.
        alternatives: the next two with another micro-batch size.
        smallest: the settings that hold least, fitting or not.
        fixes: where nothing fits, the smallest changes that would, each with its text.
        notes: what a reader must know of this plan.
        ways: the ways to use several GPUs, side by side; none for one GPU or one process.
    """

    workload: Workload
    choice: Candidate | None
    alternatives: tuple[Candidate, ...]
    smallest: Candidate
    fixes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ways: tuple[Way, ...] = ()

    @property
    def model(self) -> str:
        """The model's name, as the settings have it."""
        return self.workload.config.model.name

    @property
    def sizes(self) -> ModelSizes:
        """The model's sizes."""
        return self.workload.sizes

    @property
    def adapter_parameters(self) -> int:
        """Trainable weights."""
        return self.smallest.step.adapter_parameters

    @property
    def hardware(self) -> Hardware:
        """The GPUs, with their price."""
        return self.workload.hardware

    @property
    def tokens(self) -> int:
        """Tokens of the whole training, in all epochs."""
        return self.workload.tokens

    @property
    def fits(self) -> bool:
        """Whether anything does."""
        return self.choice is not None

    @property
    def shortfall_gib(self) -> float:
        """GiB missing on the fullest GPU; 0 where it fits."""
        return 0.0 if self.fits else self.smallest.peak_gib - self.hardware.usable_gib

    @property
    def reason(self) -> str:
        """Why the GPUs are used as they are, in plain words; empty where there is nothing to choose."""
        return reason(self.ways, self.choice, self.hardware)

    def with_note(self, note: str) -> Plan:
        """Returns a copy with one more note."""
        return replace(self, notes=(*self.notes, note))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "model": self.model,
            "parameters": self.sizes.parameters,
            "counted": self.sizes.counted,
            "trainable_parameters": self.adapter_parameters,
            "hardware": self.hardware.label,
            "gpus": self.hardware.gpus,
            "usable_gib": self.hardware.usable_gib,
            "price_usd_per_hour": self.hardware.price_usd_per_hour,
            "price_note": self.hardware.price_note,
            "tokens": self.tokens,
            "fits": self.fits,
            "shortfall_gib": round(self.shortfall_gib, 3),
            "choice": self.choice.to_dict() if self.choice else None,
            "alternatives": [each.to_dict() for each in self.alternatives],
            "smallest": self.smallest.to_dict(),
            "fixes": list(self.fixes),
            "notes": list(self.notes),
            "ways": [each.to_dict() for each in self.ways],
            "reason": self.reason,
        }

    def table(self) -> Table:
        """Returns the memory of each GPU, with the ways to use several of them and what fits best, or what would fit, below."""
        shown = self.choice or self.smallest
        table = _memory_table(shown, self.hardware)
        table.caption = (
            f"{self.model} on {self.hardware.label}: {self.sizes.parameters:,} parameters, "
            f"{self.adapter_parameters:,} trained"
        )
        lines = [self.reason] if self.reason else []
        if self.ways:
            table.below = [ways_table(self.ways, self.choice)]
        if self.choice:
            lines.append(f"fastest that fits  {self.choice!r}")
            lines += [f"next best          {each!r}" for each in self.alternatives]
            lines.append("to take it         " + " ".join(f"--set {quote(each)}" for each in self.choice.settings))
        else:
            lines.append(f"does not fit: {self.shortfall_gib:.1f} GiB are missing on the fullest GPU, with {shown!r}")
            lines += [f"would fit: {fix}" for fix in self.fixes]
        table.notes = lines + [f"note: {note}" for note in self.notes]
        return table


def make_plan(workload: Workload, *, fix: bool = True) -> Plan:
    """Plans a training run.

    Sequence length, sequences an optimizer step, adapter and optimizer are the settings'; what is left is chosen.

    Args:
        workload: what is trained, and on what.
        fix: whether to look for changes that fit, where nothing does, and to set the ways to use several GPUs side by side.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    hardware, found = workload.hardware, all_candidates(workload)
    fitting = fitting_candidates(found, hardware.usable_gib)
    choice = simplest_of_the_fastest(fitting)
    best: dict[int, Candidate] = {}  # of each micro-batch size the one that ends first, in the order in which they end
    for each in fitting:
        best.setdefault(each.micro_batch_size, each)
    others = [each for size, each in best.items() if choice and size != choice.micro_batch_size]
    smallest = min(found, key=lambda each: each.peak_gib)
    idle = not (workload.one_process or workload.only) and workload.sequences_per_step % hardware.gpus != 0
    idle = idle and can_fit(workload.on(replace(hardware, gpus=1)))
    return Plan(
        workload,
        choice,
        tuple(others[:2]),
        smallest=smallest,
        fixes=() if choice or not fix else _fixes(workload),
        notes=plan_notes(workload, choice, smallest, idle_gpus=idle),
        ways=find_ways(workload) if fix else (),
    )


def _fixes(workload: Workload) -> tuple[str, ...]:
    """Names the smallest change of the settings that fits, and the cheapest instance that does."""
    found = []
    if change := smallest_change(workload):
        settings, best = change
        found.append(" ".join(f"--set {item}" for item in settings) + f" ({best!r})")
    if other := cheapest_instance(workload):
        found.append(other.priced)
    return tuple(found)


def _memory_table(shown: Candidate, hardware: Hardware) -> Table:
    parts = [each.parts_gib() for each in shown.memory]
    named = [name for name in parts[0] if name != "gathered" or any(each[name] for each in parts)]
    rows = [[name.replace("_", " "), *(f"{each[name]:.2f}" for each in parts)] for name in named]
    rows.append(["in all", *(f"{gib(each.total):.2f}" for each in shown.memory)])
    rows.append(["usable", *(f"{hardware.usable_gib:.2f}" for _ in parts)])
    labels = [f"GPU {index} ({layers} layers)" for index, layers in enumerate(shown.layers_per_gpu)]
    if shown.processes > 1:
        part = f"1/{shown.step.shards} of each of " if shown.step.shards > 1 else ""
        labels = [f"each GPU ({part}{shown.layers} layers)"]
    rows += [
        [text, *(f"{gib(getattr(each, name)):.2f}" for each in shown.details)]
        for name, text in DETAIL_ROWS.items()
        if any(getattr(each, name) for each in shown.details)
    ]
    return Table(["GiB", *labels], rows, numbers=range(1, len(labels) + 1))
