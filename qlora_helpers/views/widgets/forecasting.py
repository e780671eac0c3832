"""What a form's settings lead to: a forecast for GPUs, the time on this machine's CPU, and where an error belongs.

A large file is not read while somebody types: its size is estimated from its first rows. Knows nothing of widgets.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import SECTIONS, DataConfig, RunConfig
from qlora_helpers.base.errors import ConfigError, DataError, ModelError, UserError
from qlora_helpers.data.examples import Example
from qlora_helpers.data.first_rows import FirstRows, first_rows
from qlora_helpers.data.known import DataSize, estimated_tokens
from qlora_helpers.data.local_files import local_files
from qlora_helpers.machine.hardware import Hardware
from qlora_helpers.machine.price import machine_price
from qlora_helpers.planning.cost import TrainingCost, training_cost
from qlora_helpers.planning.cpu_speed import cpu_threads
from qlora_helpers.planning.forecast import Forecast
from qlora_helpers.planning.run_plan import (
    ROW_TOKENS,
    UNKNOWN_TOKENS,
    as_read,
    data_size,
    forecast,
    trained_share,
)
from qlora_helpers.planning.step_settings import is_packed

LARGE_BYTES = 4 << 20
"""Files with more are not read as a whole while settings change."""
_SAMPLE_BYTES = 1 << 18
_LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
_SETTING = re.compile(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_]+")


@dataclass(frozen=True)
class Look:
    """What settings lead to.

    Attributes:
        forecast: on GPUs: those that were chosen, or on a CPU those that would usually be taken.
        cost: on this machine's CPU; None where GPUs were chosen.
    """

    forecast: Forecast
    cost: TrainingCost | None = None


def look(
    config: RunConfig,
    hardware: Hardware | None,
    usual: Hardware,
    shape: dict[str, Any],
    usd_per_hour: float | None = None,
) -> Look:
    """Works out what settings lead to.

    Args:
        config: of the run.
        hardware: the GPUs to plan for; None for this machine's CPU.
        usual: the GPUs that are shown beside a CPU.
        shape: the model's `config.json`.
        usd_per_hour: price of this machine, where a person typed one.

    Raises:
        UserError: the data can't be read, or the model can't be planned.
    """
    first = read_first(config.data)
    size, note = _size(config.data, first)
    found = forecast(config, hardware=hardware or usual, shape=shape, size=size)
    if note:
        found = replace(found, notes=(*found.notes, note))
    if hardware is not None:
        return Look(found)
    known = size or data_size(config.data) or DataSize(UNKNOWN_TOKENS // ROW_TOKENS, ROW_TOKENS)
    return Look(found, _cpu_cost(config, shape, known, usd_per_hour))


def read_first(config: DataConfig) -> FirstRows:
    """Returns the first rows of the source, which are read again only where what is read, or how, has changed.

    Raises:
        DataError: as for `first_rows`.
    """
    files = _files(config)
    return _first_rows(as_read(config), tuple((str(file), file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _first_rows(config: DataConfig, changed: tuple[tuple[str, int], ...]) -> FirstRows:
    return first_rows(config)


def _files(config: DataConfig) -> list[Path]:
    return [] if "://" in config.source or config.source.startswith("embedded") else local_files(config.source) or []


def _size(config: DataConfig, first: FirstRows) -> tuple[DataSize | None, str]:
    """Estimates the size of large files, with a note; None where the forecast counts for itself."""
    files = _files(config)
    size = sum(file.stat().st_size for file in files)
    if size <= LARGE_BYTES or not first.rows:
        return None, ""
    per_row = _bytes_per_row(files[0], first.rows)
    tokens = sum(map(_tokens, first.rows)) / len(first.rows)
    rows = max(1, round(size / per_row))
    return DataSize(rows, tokens), f"{files[0].name}: about {rows:,} rows, estimated from the first {len(first.rows)}"


def _bytes_per_row(file: Path, rows: Sequence[Example]) -> float:
    if file.suffix.lower() in _LINES:
        with open(file, "rb") as opened:
            sample = opened.read(_SAMPLE_BYTES)
        return len(sample) / max(1, sample.count(b"\n"))
    return max(1.0, sum(map(_characters, rows)) / len(rows))


def _characters(row: Example) -> int:
    return len(row.text) + sum(len(message.content) for message in row.messages)


def _tokens(row: Example) -> float:
    return sum(estimated_tokens(text) for text in (row.text, *(message.content for message in row.messages)))


def _cpu_cost(config: RunConfig, shape: dict[str, Any], size: DataSize, usd_per_hour: float | None) -> TrainingCost:
    rows = min(size.rows, config.data.most_rows("train") or size.rows)
    tokens = round(rows * size.tokens_per_row)
    packed = is_packed(config, shape)
    price = machine_price(config.train)
    return training_cost(
        config,
        shape,
        rows=rows,
        tokens=tokens,
        sequences=-(-tokens // config.data.seq_len_tokens) if packed else rows,
        trained_share=trained_share(config.data),
        hardware=None,
        cores=cpu_threads(),
        usd_per_hour=usd_per_hour if usd_per_hour is not None else price.usd_per_hour if price else None,
        packed=packed,
    )


def placed(error: UserError, shown: Collection[str]) -> dict[str, str]:
    """Returns where an error belongs: setting -> one sentence; what belongs to no setting that is shown is under an empty name.

    Args:
        error: of the settings, the data or the model.
        shown: the settings that have a control.
    """
    if isinstance(error, ConfigError):
        found: dict[str, str] = {}
        for problem in error.problems:
            name, _, rest = problem.partition(": ")
            if name not in shown:
                name, rest = next((each for each in _SETTING.findall(problem) if each in shown), ""), problem
            found[name] = f"{found[name]}; {rest}" if name in found else rest
        return found
    sentence = str(error).removesuffix(error.next_step).strip()
    named = _SETTING.findall(f"{error.problem} {error.got} {error.next_step}")
    if isinstance(error, DataError):
        named = [name for name in named if name.startswith("data.")]
        named = (named if "no such file" not in error.problem else []) + ["data.source"]
    elif isinstance(error, ModelError):
        named = ["model.name"]
    return {next((name for name in named if name in shown), ""): sentence}
