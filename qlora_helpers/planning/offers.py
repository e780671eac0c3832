"""Every GPU and instance of the catalogue on which a training fits, with its fastest settings and price: the cheapest first.

For a machine without a GPU, before any is rented. Imports no torch; knows nothing of runs on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.tables import Table, Tabular
from qlora_helpers.base.units import duration
from qlora_helpers.machine.hardware import GPUS, Hardware, parse_gpus
from qlora_helpers.machine.instances import INSTANCES
from qlora_helpers.planning.notes import model_notes, settings_notes
from qlora_helpers.planning.plan import Plan
from qlora_helpers.planning.run_plan import plan_run


@dataclass(frozen=True)
class Offers(Tabular):
    """Where a training fits.

    Attributes:
        plans: those that fit, of each card alone and each number of them that an instance has; the cheapest first, by the price of
            the whole training, and after them those without a known price, by time.
        closest: the plan that misses least, where none fits.
    """

    plans: tuple[Plan, ...]
    closest: Plan | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "offers": [each.to_dict() for each in self.plans],
            "closest": self.closest.to_dict() if self.closest else None,
        }

    def table(self) -> Table:
        """Returns a row for each, with what to ask for."""
        columns = [
            "hardware",
            "USD an hour",
            "USD in all",
            "time",
            "tokens/s",
            "peak GiB",
            "sequences x checkpointed layers",
        ]
        table = Table(columns, [_row(each) for each in self.plans], numbers=range(1, 6))
        shown = self.plans[0] if self.plans else self.closest
        if shown is not None:
            table.caption = f"{shown.model}: {shown.sizes.parameters:,} parameters, {shown.tokens:,} tokens to train on"
            notes = (*model_notes(shown.sizes), *settings_notes(shown.workload))
            table.notes = [f"note: {note}" for note in notes]
        if self.closest:
            missing = f"{self.closest.shortfall_gib:.1f} GiB are missing on {self.closest.hardware.label}"
            table.notes += [f"fits on none of these: {missing}", *(f"would fit: {fix}" for fix in self.closest.fixes)]
        if priced := {each.hardware.price_note for each in self.plans if each.hardware.price_note}:
            table.notes.append(f"note: prices are of {'; '.join(sorted(priced))}")
        table.notes.append("settings to take, and each card's memory: plan --gpus NAME")
        return table


def _row(plan: Plan) -> list[str]:
    choice, hardware = plan.choice, plan.hardware
    assert choice is not None
    price = hardware.price_usd_per_hour
    gpus = f" ({hardware.gpus} x {hardware.gpu.name})" if hardware.gpu and hardware.label in INSTANCES else ""
    return [
        f"{hardware.label}{gpus}",
        "-" if price is None else f"{price:.2f}",
        "-" if choice.dollars is None else f"{choice.dollars:,.2f}",
        duration(choice.seconds),
        f"{choice.tokens_per_s:,.0f}",
        f"{choice.peak_gib:.1f}",
        f"{choice.micro_batch_size} x {choice.checkpointed} of {choice.layers}",
    ]


def catalogued_hardware() -> list[Hardware]:
    """Lists each card alone, and of the instances with the same cards the one with the lowest known price."""
    found: dict[tuple[str, int], Hardware] = {}
    for hardware in map(parse_gpus, INSTANCES):
        price = hardware.price_usd_per_hour
        if hardware.gpu is None or price is None:
            continue
        kind = (hardware.gpu.name, hardware.gpus)
        held = found[kind].price_usd_per_hour if kind in found else None
        if held is None or price < held:
            found[kind] = hardware
    alone = [parse_gpus(name) for name in GPUS if (name, 1) not in found]
    return [*found.values(), *alone]


def find_offers(config: RunConfig, *, tokens: int | None = None) -> Offers:
    """Plans a training on all hardware of the catalogue.

    Args:
        config: model, adapter, sequence length, sequences an optimizer step, epochs, data.
        tokens: as `plan_run` takes them.

    Raises:
        UserError: no such model, or the data can't be read.
    """
    plans = [plan_run(config, hardware=hardware, tokens=tokens) for hardware in catalogued_hardware()]
    fitting = [each for each in plans if each.choice is not None]
    if not fitting:
        return Offers((), min(plans, key=lambda each: each.shortfall_gib))
    return Offers(tuple(sorted(fitting, key=_cheapest_first)))


def _cheapest_first(plan: Plan) -> tuple[bool, float]:
    assert plan.choice is not None
    dollars = plan.choice.dollars
    return dollars is None, plan.choice.seconds if dollars is None else dollars
