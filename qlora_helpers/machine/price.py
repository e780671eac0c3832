"""The price of an hour of this machine: from the settings, else from the catalogue where this is a SageMaker instance."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.machine import studio, telemetry
from qlora_helpers.machine.hardware import find_gpu
from qlora_helpers.machine.instances import INSTANCES, Instance

BOARD_NAME = Path("/sys/devices/virtual/dmi/id/product_name")
"""Holds the instance type, such as `g5.12xlarge`, on EC2's Nitro machines."""


@dataclass(frozen=True)
class Price:
    """The price of an hour, USD, and its source."""

    usd_per_hour: float
    source: str


def machine_price(config: TrainConfig, nvml: Any = None) -> Price | None:
    """Finds the price of this machine; None where it is not known.

    The catalogue's prices hold for SageMaker's instances alone, so they are used only inside SageMaker: by the instance's name
    where the machine reports it, else by its GPUs. Where several instances have those GPUs, the most expensive one counts: a limit
    in dollars then stops too early rather than too late.

    Args:
        config: training settings; `usd_per_hour` overrides everything else.
        nvml: replaces the module `pynvml`.
    """
    if config.usd_per_hour is not None:
        return Price(config.usd_per_hour, "as given")
    if not (studio.this_app() or os.environ.get("SM_CURRENT_INSTANCE_TYPE")):
        return None
    named = INSTANCES.get(os.environ.get("SM_CURRENT_INSTANCE_TYPE") or f"ml.{_board_name()}")
    found = [named] if named else _with_gpus_of_this_machine(nvml)
    priced = [(each.price_usd_per_hour, each) for each in found if each.price_usd_per_hour is not None]
    if not priced:
        return None
    price, instance = max(priced, key=lambda pair: pair[0])
    return Price(price, f"{instance.name}, {instance.region}, {instance.priced_on}")


def needed_price(config: TrainConfig, nvml: Any = None) -> Price | None:
    """Finds the price of this machine, which must be known where `stop_at_usd` is set.

    Raises:
        UserError: there is a limit in dollars, and no price.
    """
    price = machine_price(config, nvml)
    if price is None and config.stop_at_usd is not None:
        raise UserError(
            "train.stop_at_usd is set, but the price of this machine is not known",
            expected="a price an hour",
            next_step="Give it: train.usd_per_hour=7.09. Or limit the time: train.stop_at_minutes.",
        )
    return price


def _with_gpus_of_this_machine(nvml: Any) -> list[Instance]:
    gpus = telemetry.read_gpus(nvml)
    known = find_gpu(gpus[0].name) if gpus else None
    return [
        instance
        for instance in INSTANCES.values()
        if known and (instance.gpu, instance.gpus) == (known.name, len(gpus))
    ]


def _board_name() -> str:
    try:
        return BOARD_NAME.read_text().strip()
    except OSError:
        return ""
