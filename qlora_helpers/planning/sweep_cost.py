"""What the runs of a sweep will take, before any of them starts: memory, time and price of each. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.machine.price import machine_price
from qlora_helpers.model.shapes.lookup import find_shape
from qlora_helpers.planning.cost import TrainingCost, training_cost
from qlora_helpers.planning.cpu_speed import cpu_threads
from qlora_helpers.planning.run_plan import ROW_TOKENS, UNKNOWN_TOKENS, data_size, has_gpu, this_machine, trained_share
from qlora_helpers.planning.step_settings import is_packed


def sweep_costs(configs: Iterable[RunConfig]) -> list[TrainingCost]:
    """Estimates what training takes on this machine with each of some settings, in one process as a sweep trains its runs.

    Raises:
        UserError: no such model, or the data can't be read.
    """
    return [_cost(config) for config in configs]


def _cost(config: RunConfig) -> TrainingCost:
    shape, size = find_shape(config.model), data_size(config.data)
    known = size.rows if size else UNKNOWN_TOKENS // ROW_TOKENS
    rows = min(known, config.data.most_rows("train") or known)
    tokens = round(rows * (size.tokens_per_row if size else ROW_TOKENS))
    packed = is_packed(config, shape)
    on_gpu = config.model.device_map != "cpu" and has_gpu()
    price = machine_price(config.train)
    hardware = None
    if on_gpu:
        hardware = this_machine(price.usd_per_hour if price else None)
        if config.train.share == "one":  # else the one process that trains a run spreads its layers over all GPUs
            hardware = replace(hardware, gpus=1)
    try:
        return training_cost(
            config,
            shape,
            rows=rows,
            tokens=tokens,
            sequences=max(1, math.ceil(tokens / config.data.seq_len_tokens)) if packed else rows,
            trained_share=trained_share(config.data),
            hardware=hardware,
            cores=cpu_threads(),
            usd_per_hour=price.usd_per_hour if price else None,
            packed=packed,
        )
    except UserError as error:
        raise UserError(
            f"the sweep can't be planned: {error.problem}", got=error.got, next_step=error.next_step
        ) from error
