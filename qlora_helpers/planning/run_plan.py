"""A plan for a run's settings: finds the model's shape, the hardware and the size of the data, and asks `plan`.

What notebooks, forms and the command line call. Downloads at most a config.json; imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import DataConfig, RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.units import gib
from qlora_helpers.data.known import CHARACTERS_PER_TOKEN, DATA_SIZES, DataSize
from qlora_helpers.data.sources import read_corpus
from qlora_helpers.machine import telemetry
from qlora_helpers.machine.hardware import Hardware, find_gpu, parse_gpus
from qlora_helpers.model.shapes.lookup import find_shape
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.candidates import blocks_per_step, is_packed, together
from qlora_helpers.planning.forecast import Forecast, look_ahead
from qlora_helpers.planning.memory import predict
from qlora_helpers.planning.plan import Plan, make_plan
from qlora_helpers.planning.speed import UNNAMED_GPU, step_seconds
from qlora_helpers.planning.step_settings import step_settings

UNKNOWN_TOKENS, ROW_TOKENS = 1_000_000, 200  # of a source whose size is not known


def plan_run(
    config: RunConfig,
    *,
    gpus: str | None = None,
    price: float | None = None,
    tokens: int | None = None,
    hardware: Hardware | None = None,
    one_process: bool = False,
) -> Plan:
    """What fits for these settings, how fast it is, and what it costs, before anything is downloaded.

    Args:
        config: model, adapter, block length, blocks an optimizer step, epochs, data.
        gpus: `4x24GiB`, `H100`, `2xL4` or `ml.g5.12xlarge`; None takes this machine's GPUs.
        price: USD an hour for all of the hardware, in place of the catalogue's.
        tokens: of the training data; None counts a local file, knows the data sets of this project, and else assumes a million.
        hardware: in place of `gpus` and `price`.
        one_process: leaves out a copy of the model on each of several GPUs, which takes torchrun.

    Raises:
        UserError: no such hardware or model, or this machine has no GPU and none was named.
    """
    hardware = hardware or (parse_gpus(gpus, price) if gpus else this_machine(price))
    shape = find_shape(config.model)
    if tokens is not None and tokens < 1:
        raise UserError("that is no amount of data", expected="tokens, 1 or more", got=str(tokens))
    known = tokens if tokens is not None else estimated_tokens(config.data)
    if config.train.max_steps is not None:  # whatever there is
        length = config.data.seq_len_tokens
        known = math.ceil(config.train.max_steps * blocks_per_step(config) * length / config.train.epochs)
    plan = make_plan(
        config.model.name,
        shape,
        hardware,
        config,
        tokens=known or UNKNOWN_TOKENS,
        trained_share=trained_share(config.data),
        one_process=one_process,
    )
    if not is_packed(config, shape) and config.train.max_steps is None:
        plan = plan.with_note("what pads the rows comes on top of the data's tokens: it takes longer than this")
    if known is None:
        plan = plan.with_note(
            f"the size of {config.data.source} is not known: time is for a million tokens (--tokens N)"
        )
    return plan


def predicted_step(
    config: RunConfig,
    *,
    hardware: Hardware,
    compiled: bool,
    checkpointed: int,
    trained_share: float,
    captured: bool = False,
    fill: float = 1.0,
    copies: int = 1,
) -> dict[str, object]:
    """What a step with these very settings should hold and how fast it should be: to stand beside what was measured.

    Args:
        config: of the run.
        hardware: the GPUs that hold one copy of the model.
        compiled, checkpointed: of the decoder layers.
        trained_share: of the tokens.
        captured: whether passes were played from CUDA graphs.
        fill: share of a block that is not padding.
        copies: processes that each train a copy (torchrun).

    Returns:
        `allocated_gib` and `reserved_gib` of each GPU, `tokens_per_s` of all copies without padding, and
        whether that is `extrapolated`.
    """
    shape = find_shape(config.model)
    step = step_settings(
        config,
        shape,
        blocks=config.train.micro_batch_size,
        checkpointed=checkpointed,
        compiled=compiled,
        captured=captured,
        trained_share=trained_share,
    )
    step = replace(step, copies=copies)
    _, memory = predict(model_sizes(shape), step, gpus=hardware.gpus)
    seconds = step_seconds(model_sizes(shape), step, hardware.gpu or UNNAMED_GPU)
    return {
        "allocated_gib": {f"cuda:{index}": round(gib(each.allocated), 3) for index, each in enumerate(memory)},
        "reserved_gib": {f"cuda:{index}": round(gib(each.reserved), 3) for index, each in enumerate(memory)},
        "tokens_per_s": round(step.tokens * fill / seconds * together(copies), 1),
        "extrapolated": not (hardware.gpu and hardware.gpu.measured),
    }


def layers_per_gpu(config: RunConfig, gpus: int) -> tuple[int, ...] | None:
    """How many decoder layers each GPU gets, so that the fullest holds the least while it trains with these settings.

    Returns:
        None where the model can't be planned.
    """
    try:
        shape = find_shape(config.model)
        sizes = model_sizes(shape)
        again = (
            sizes.blocks
            if config.train.checkpointed_layers is None
            else min(config.train.checkpointed_layers, sizes.blocks)
        )
        step = step_settings(
            config,
            shape,
            blocks=config.train.micro_batch_size,
            compiled=config.train.compile == "on",
            checkpointed=again if config.train.activation_checkpointing else 0,
            trained_share=trained_share(config.data),
        )
    except UserError:
        return None
    counts, _ = predict(sizes, step, gpus=gpus)
    return counts


def this_machine(price: float | None = None) -> Hardware:
    """The GPUs of this machine; the smallest counts where they differ.

    Raises:
        UserError: there is none.
    """
    found = [gpu for gpu in telemetry.read_gpus() if gpu.memory_total_gib]  # some cards don't tell
    if not found:
        raise UserError(
            "this machine has no GPU that tells its memory",
            expected="the hardware to plan for",
            next_step="Name it: --gpus 24GiB, 4xL4, ml.g5.12xlarge.",
        )
    usable = min(gpu.memory_total_gib for gpu in found)
    known = find_gpu(found[0].name)
    label = found[0].name if len(found) == 1 else f"{len(found)}x{found[0].name}"
    if known is not None:
        usable = min(usable, known.usable_gib)
    return Hardware(label, len(found), usable, known, price, "as given" if price is not None else "")


def estimated_tokens(config: DataConfig) -> int | None:
    """Tokens of the training rows with the recipe's prompt, or None where the source would have to be downloaded to know."""
    size = data_size(config)
    return None if size is None else round(min(size.rows, config.train_rows or size.rows) * size.tokens_per_row)


def data_size(config: DataConfig) -> DataSize | None:
    """Training rows of a source and tokens a row, whatever `train_rows` says; None where it would have to be downloaded to know.

    A local file is read once, and again where it has changed.

    Raises:
        DataError: the file can't be read or used.
    """
    if config.source in DATA_SIZES:
        return DATA_SIZES[config.source]
    path = Path(config.source).expanduser()
    if "://" in config.source or not path.name.lower().endswith((".json", ".jsonl", ".csv", ".parquet", ".7z")):
        return None
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return _file_size(replace(config, train_rows=None), changed)


@lru_cache(maxsize=8)
def _file_size(config: DataConfig, changed: int) -> DataSize:
    rows = read_corpus(config).train
    tokens = sum(len(row.dialogue) + len(row.summary) for row in rows) / CHARACTERS_PER_TOKEN
    return DataSize(len(rows), tokens / max(1, len(rows)))


def forecast(
    config: RunConfig, *, hardware: Hardware, shape: dict[str, Any] | None = None, tokens: int | None = None
) -> Forecast:
    """What these very settings lead to on some hardware, and beside it the plan.

    Args:
        config: of the run.
        hardware: as `this_machine` or `parse_gpus` gives it.
        shape: the model's `config.json`, where it is at hand.
        tokens: of the training data; None counts a local file, knows the data sets of this project, and else assumes a million.

    Raises:
        UserError: no such model, or the data can't be read.
    """
    shape = find_shape(config.model) if shape is None else shape
    size = data_size(config.data) if tokens is None else DataSize(max(1, round(tokens / ROW_TOKENS)), ROW_TOKENS)
    found = look_ahead(
        config,
        shape,
        hardware,
        size or DataSize(UNKNOWN_TOKENS // ROW_TOKENS, ROW_TOKENS),
        trained_share=trained_share(config.data),
    )
    if size is None:
        note = f"the size of {config.data.source} is not known: time is for a million tokens"
        found = replace(found, notes=(*found.notes, note))
    return found


def trained_share(config: DataConfig) -> float:
    """Of the tokens, before they are counted: a summary is about a fifth of its row."""
    return 1.0 if config.loss_on == "all" else 0.2
