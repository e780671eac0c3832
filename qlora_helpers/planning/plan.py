"""The fastest settings that fit, their time and price, and the next best: by arithmetic, before a byte is downloaded.

Takes a model's `config.json`, the hardware and a run's settings, and chooses among `candidates`; where nothing fits it says what
would. Imports no torch; knows nothing of runs on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.model.shapes.sizes import ModelSizes, model_sizes
from qlora_helpers.planning.candidates import Candidate, all_candidates, blocks_per_step, fitting_in
from qlora_helpers.planning.fixes import can_fit, cheapest_instance, smallest_change
from qlora_helpers.planning.notes import _not_chosen, _notes, _sharing_note, settings_notes
from qlora_helpers.planning.step_settings import step_settings

BESIDE = {
    "activations_kept": "(activations, none recomputed)",
    "activations_checkpointed": "(activations, all recomputed)",
    "logits": "(logits in the loss)",
}
"""Rows below the sum, which are no part of it."""


@dataclass(frozen=True)
class Plan(Tabular):
    """What fits, how fast it is, and what to change where nothing does.

    Attributes:
        model: the name that was asked about.
        sizes: the model's.
        adapter_parameters: trainable weights.
        hardware: the GPUs.
        tokens: of the whole training, in all epochs.
        choice: the fastest that fits, or None.
        alternatives: the next two of other micro-batch.
        smallest: the settings that hold least, fitting or not.
        fixes: where nothing fits, the smallest changes that would, each with its text.
        notes: what a reader must know of this plan.
    """

    model: str
    sizes: ModelSizes
    adapter_parameters: int
    hardware: Hardware
    tokens: int
    choice: Candidate | None
    alternatives: tuple[Candidate, ...]
    smallest: Candidate
    fixes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.choice is not None

    @property
    def shortfall_gib(self) -> float:
        """GiB missing on the fullest GPU; 0 where it fits."""
        return 0.0 if self.fits else self.smallest.peak_gib - self.hardware.usable_gib

    def with_note(self, note: str) -> Plan:
        """A copy that says one thing more."""
        return replace(self, notes=(*self.notes, note))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "model": self.model,
            "parameters": self.sizes.parameters,
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
        }

    def table(self) -> Table:
        """Returns the memory of each GPU, with what fits best, or what would fit, below."""
        shown = self.choice or self.smallest
        table = _memory_table(shown, self.hardware)
        table.caption = (
            f"{self.model} on {self.hardware.label}: {self.sizes.parameters:,} parameters, "
            f"{self.adapter_parameters:,} trained"
        )
        lines = []
        if self.choice:
            lines.append(f"fastest that fits  {self.choice!r}")
            lines += [f"next best          {each!r}" for each in self.alternatives]
            lines.append("to take it         " + " ".join(f"--set {setting}" for setting in self.choice.settings))
        else:
            lines.append(f"does not fit: {self.shortfall_gib:.1f} GiB too much on the fullest GPU, at {shown!r}")
            lines += [f"would fit: {fix}" for fix in self.fixes]
        table.notes = lines + [f"note: {note}" for note in self.notes]
        return table


def make_plan(
    model: str,
    shape: dict[str, Any],
    hardware: Hardware,
    config: RunConfig,
    *,
    tokens: int,
    trained_share: float = 0.2,
    one_process: bool = False,
    fix: bool = True,
) -> Plan:
    """Plans a training run.

    Args:
        model: its name, for the reader.
        shape: its `config.json`.
        hardware: the GPUs, with their price.
        config: adapter, optimizer, block length and blocks an optimizer step are taken from here; what is left is chosen.
        tokens: that are trained on in one epoch.
        trained_share: of the tokens.
        one_process: leaves out a copy of the model on each of several GPUs, which takes torchrun.
        fix: whether to look for changes that fit, where nothing does.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    total = round(tokens * config.train.epochs)
    found = all_candidates(shape, hardware, config, total, trained_share, (hardware.gpus,) if one_process else None)
    best: dict[int, Candidate] = {}  # of each micro-batch the way that ends first, in the order in which they end
    for each in fitting_in(hardware, found):
        best.setdefault(each.blocks, each)
    choice, *others = list(best.values()) or [None]
    sizes, smallest = model_sizes(shape), min(found, key=lambda each: each.peak_gib)
    step = step_settings(config, shape, blocks=1, trained_share=trained_share)
    idle = not one_process and blocks_per_step(config) % hardware.gpus != 0
    idle = idle and can_fit(shape, replace(hardware, gpus=1), config, trained_share)
    return Plan(
        model,
        sizes,
        step.adapter_parameters,
        hardware,
        total,
        choice,
        tuple(others[:2]),
        smallest=smallest,
        fixes=() if choice or not fix else _fixes(shape, hardware, config, total, trained_share, one_process),
        notes=(
            *_notes(hardware, sizes, choice),
            *settings_notes(config, shape),
            *([_sharing_note(hardware, config)] if idle else []),
            *_not_chosen(shape, config, choice or smallest, trained_share),
        ),
    )


def _fixes(
    shape: dict[str, Any], hardware: Hardware, config: RunConfig, tokens: int, trained_share: float, one_process: bool
) -> tuple[str, ...]:
    """The smallest change of the settings that fits, and the cheapest instance that does."""
    found = []
    if change := smallest_change(shape, hardware, config, tokens, trained_share, one_process):
        settings, best = change
        found.append(" ".join(f"--set {item}" for item in settings) + f" ({best!r})")
    if other := cheapest_instance(shape, config, trained_share):
        found.append(other.priced)
    return tuple(found)


def _memory_table(shown: Candidate, hardware: Hardware) -> Table:
    parts = [each.parts_gib() for each in shown.memory]
    rows = [[name.replace("_", " "), *(f"{each[name]:.2f}" for each in parts)] for name in parts[0]]
    rows.append(["in all", *(f"{gib(each.total):.2f}" for each in shown.memory)])
    rows.append(["usable", *(f"{hardware.usable_gib:.2f}" for _ in parts)])
    labels = [f"GPU {index} ({layers} layers)" for index, layers in enumerate(shown.layers_per_gpu)]
    rows += [
        [text, *(f"{gib(getattr(each, name)):.2f}" for each in shown.beside)]
        for name, text in BESIDE.items()
        if any(getattr(each, name) for each in shown.beside)
    ]
    return Table(["GiB", *labels], rows, numbers=range(1, len(labels) + 1))
