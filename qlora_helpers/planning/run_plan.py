"""A plan for a run's settings: finds the model's shape, the hardware and the size of the data, and asks `plan`.

Notebooks, forms and the command line call this. Downloads at most a config.json; imports no torch.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_helpers.base.config import DataConfig, RunConfig
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.units import gib
from qlora_helpers.data.examples import SUMMARIZE
from qlora_helpers.data.known import DATA_SIZES, DataSize
from qlora_helpers.data.known import estimated_tokens as tokens_of_text
from qlora_helpers.data.local_files import local_files
from qlora_helpers.data.sources import EMBEDDED, read_corpus
from qlora_helpers.machine import telemetry
from qlora_helpers.machine.hardware import Hardware, find_gpu, parse_gpus
from qlora_helpers.machine.links import PCIE
from qlora_helpers.machine.price import machine_price
from qlora_helpers.model.shapes.headers import checkpoint_parameters
from qlora_helpers.model.shapes.lookup import find_shape
from qlora_helpers.planning.candidates import copies_speedup
from qlora_helpers.planning.exchange import exchange
from qlora_helpers.planning.forecast import Forecast, make_forecast, steps_and_tokens
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.memory import predict
from qlora_helpers.planning.plan import Plan, make_plan
from qlora_helpers.planning.speed import step_time
from qlora_helpers.planning.step_settings import SUMMARY_SHARE, is_packed
from qlora_helpers.planning.workload import TrainingTokens, Workload

HEADERS_TOLERANCE = 0.001  # of the weights
UNKNOWN_TOKENS, ROW_TOKENS = 1_000_000, 200  # of a source whose size is not known
AFTER_READING = (
    *("template", "loss_on", "train_on", "packing", "seq_len_tokens", "long_rows", "train_rows", "embedded_train_rows"),
)
"""Settings of the data that the number of training rows and their texts don't depend on."""


def plan_run(
    config: RunConfig,
    *,
    gpus: str | None = None,
    price: float | None = None,
    tokens: int | None = None,
    hardware: Hardware | None = None,
    one_process: bool = False,
    only: Layout | None = None,
    fix: bool = True,
) -> Plan:
    """Plans a run: what fits, how fast it is and what it costs, before anything is downloaded.

    Args:
        config: model, adapter, sequence length, sequences an optimizer step, epochs, data.
        gpus: `4x24GiB`, `H100`, `2xL4` or `ml.g5.12xlarge`; None takes this machine's GPUs.
        price: USD an hour for all of the hardware; None takes the catalogue's, and for this machine `train.usd_per_hour` first.
        tokens: of the training data; None counts a local file, knows this project's data sets, and otherwise assumes a million.
        hardware: in place of `gpus` and `price`.
        one_process: rules out a copy of the model on each of several GPUs, which takes several processes.
        only: the one way to use the GPUs that is open; the settings ask for the sequences of all its processes.
        fix: whether to look for changes that fit, where nothing does, and to set the ways to use several GPUs side by side.

    Raises:
        UserError: no such hardware or model, or this machine has no GPU and none was named.
    """
    if hardware is None and gpus is None and price is None:
        known_price = machine_price(config.train)
        price = known_price.usd_per_hour if known_price else None
    hardware = hardware or (parse_gpus(gpus, price) if gpus else this_machine(price))
    shape = find_shape(config.model)
    if tokens is not None and tokens < 1:
        raise UserError("the amount of data is not valid", expected="tokens, 1 or more", got=str(tokens))
    known = tokens if tokens is not None else estimated_tokens(config.data)
    data = TrainingTokens(known or UNKNOWN_TOKENS, trained_share(config.data))
    workload = Workload(config, shape, hardware, data.in_all(config), data.trained_share, one_process, only)
    plan = make_plan(workload, fix=fix)
    for note in _checked_with_headers(config.model.name, plan):
        plan = plan.with_note(note)
    if not workload.packed and config.train.max_steps is None:
        plan = plan.with_note("padding comes on top of the data's tokens: training takes longer than this")
    if known is None and config.train.max_steps is None:
        plan = plan.with_note(
            f"the size of {config.data.source} is not known: time is for a million tokens (--tokens N)"
        )
    return plan


def _checked_with_headers(name: str, plan: Plan) -> list[str]:
    """Compares a plan's weights with a local checkpoint's own, and says so."""
    folder, sizes = Path(name).expanduser(), plan.sizes
    held = checkpoint_parameters(folder) if folder.is_dir() else None
    if held is None:
        return []
    repeated = sizes.vocab * sizes.hidden if sizes.tied else 0
    whole = sizes.parameters + sizes.beside_text
    if min(abs(held - each) for each in (sizes.parameters, whole, whole + repeated)) <= HEADERS_TOLERANCE * whole:
        return [f"the checkpoint's own headers hold as many weights: {held:,}"]
    return [
        f"the checkpoint's own headers hold {held:,} weights, the plan counts {whole:,}: its config.json is not this checkpoint's, "
        "or the checkpoint holds parts that are not loaded"
    ]


def predicted_step(
    config: RunConfig,
    *,
    hardware: Hardware,
    compiled: bool,
    checkpointed: int,
    trained_share: float,
    captured: bool = False,
    fill: float = 1.0,
    layout: Layout | None = None,
    fp8: bool = False,
) -> dict[str, object]:
    """Predicts memory and speed of a step with these very settings, to compare with what was measured.

    Args:
        config: of the run, as each of its processes has it.
        hardware: the GPUs that train.
        compiled, checkpointed: of the decoder layers.
        trained_share: share of the tokens that count in the loss.
        captured: whether passes were replayed as CUDA graphs.
        fill: share of a sequence that is not padding.
        layout: how the GPUs are used; None means one process whose layers are spread over them.
        fp8: whether frozen weights were multiplied in FP8.

    Returns:
        `allocated_gib` and `reserved_gib` of each GPU (of the first, where all hold as much), `tokens_per_s` of all processes
        without padding, and whether the speed is `extrapolated`.
    """
    layout = layout or Layout(spread=hardware.gpus)
    workload = Workload(config, find_shape(config.model), hardware, tokens=0, trained_share=trained_share)
    step = workload.step(
        checkpointed=checkpointed,
        compiled=compiled,
        captured=captured,
        copies=layout.copies,
        shards=layout.shards,
        fp8=False,
    )
    gpu = workload.gpu
    step = replace(step, fp8=fp8 and gpu.fp8_tflops > 0)
    _, memory = predict(workload.sizes, step, gpus=layout.spread)
    time = step_time(workload.sizes, step, gpu)
    sent = exchange(workload.sizes, step, hardware, time)
    seconds = time.seconds(sent.waits_s) + sent.average_s / config.train.gradient_accumulation_steps
    return {
        "allocated_gib": {f"cuda:{index}": round(gib(each.allocated), 3) for index, each in enumerate(memory)},
        "reserved_gib": {f"cuda:{index}": round(gib(each.reserved), 3) for index, each in enumerate(memory)},
        "tokens_per_s": round(step.tokens * fill / seconds * copies_speedup(layout.processes), 1),
        "extrapolated": not (hardware.gpu and (gpu.fp8_measured if fp8 else gpu.measured)),
    }


def layers_per_gpu(config: RunConfig, gpus: int) -> tuple[int, ...] | None:
    """Spreads decoder layers over GPUs so that the fullest one holds as little as possible while it trains.

    Returns:
        Decoder layers of each GPU; None where the model can't be planned.
    """
    hardware = Hardware("", gpus, 0.0, None, None, "")  # what one GPU holds does not matter here
    try:
        workload = Workload(
            config, find_shape(config.model), hardware, tokens=0, trained_share=trained_share(config.data)
        )
        layers, asked = workload.sizes.layers, config.train.checkpointed_layers
        checkpointed = layers if asked is None else min(asked, layers)
        step = workload.step(
            compiled=config.train.compile == "on",
            checkpointed=checkpointed if config.train.activation_checkpointing else 0,
        )
    except UserError:
        return None
    counts, _ = predict(workload.sizes, step, gpus=gpus)
    return counts


def this_machine(price: float | None = None) -> Hardware:
    """Returns the GPUs of this machine; the smallest counts where they differ.

    Raises:
        UserError: there is none.
    """
    found = [gpu for gpu in telemetry.read_gpus() if gpu.memory_total_gib]  # some cards don't report it
    if not found:
        raise UserError(
            "this machine has no GPU that reports its memory",
            expected="the hardware to plan for",
            next_step="Name it: --gpus 24GiB, 4xL4, ml.g5.12xlarge.",
        )
    usable = min(gpu.memory_total_gib or 0.0 for gpu in found)
    known = find_gpu(found[0].name)
    label = found[0].name if len(found) == 1 else f"{len(found)}x{found[0].name}"
    if known is not None:
        usable = min(usable, known.usable_gib)
    note = "as given" if price is not None else ""
    link = PCIE.get(telemetry.pcie_generation() or 0) if len(found) > 1 else None
    return Hardware(label, len(found), usable, known, price, note, found_link=link)


def has_gpu() -> bool:
    """Whether this machine has a GPU that a plan can be made for."""
    return any(gpu.memory_total_gib for gpu in telemetry.read_gpus())


def estimated_tokens(config: DataConfig) -> int | None:
    """Estimates the tokens of the training rows with the recipe's prompt; None where the source would have to be downloaded."""
    size = data_size(config)
    return None if size is None else round(min(size.rows, config.most_rows("train") or size.rows) * size.tokens_per_row)


def planned_tokens(config: DataConfig) -> TrainingTokens:
    """Returns how much data a run is planned for, as `plan_run` and thus a start take it: a million tokens where nothing is known.

    Raises:
        DataError: they can't be read or used.
    """
    return TrainingTokens(estimated_tokens(config) or UNKNOWN_TOKENS, trained_share(config))


def data_size(config: DataConfig) -> DataSize | None:
    """Estimates a source's training rows, whatever `train_rows` says, and tokens a row; None where it would have to be downloaded.

    Local files are read once, and again where they have changed.

    Raises:
        DataError: they can't be read or used.
    """
    if config.source in DATA_SIZES:
        return DATA_SIZES[config.source]
    if config.source in EMBEDDED:
        return _file_size(as_read(config), ())
    files = None if "://" in config.source else local_files(config.source)
    if files is None:
        return None
    changed = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _file_size(as_read(config), changed)


def as_read(config: DataConfig) -> DataConfig:
    """Returns the settings without what is done with rows once they are read, so that a change of it reads no file again."""
    plain: dict[str, Any] = {item.name: item.default for item in fields(config) if item.name in AFTER_READING}
    return replace(config, **plain)


@lru_cache(maxsize=8)
def _file_size(config: DataConfig, changed: tuple[tuple[str, int, int], ...]) -> DataSize:
    rows = read_corpus(config).train
    texts = (
        text for row in rows for text in (row.text, *(each.content.removeprefix(SUMMARIZE) for each in row.messages))
    )
    tokens = sum(map(tokens_of_text, texts))
    return DataSize(len(rows), tokens / max(1, len(rows)))


def forecast(
    config: RunConfig,
    *,
    hardware: Hardware,
    shape: dict[str, Any] | None = None,
    tokens: int | None = None,
    size: DataSize | None = None,
) -> Forecast:
    """Works out what these very settings lead to on some hardware, and the plan to compare with.

    Args:
        config: of the run.
        hardware: as `this_machine` or `parse_gpus` gives it.
        shape: the model's `config.json`; None looks it up.
        tokens: of the training data; None counts a local file, knows this project's data sets, and otherwise assumes a million.
        size: of the training data, where the caller knows it.

    Raises:
        UserError: no such model, or the data can't be read.
    """
    shape = find_shape(config.model) if shape is None else shape
    if size is None:
        size = data_size(config.data) if tokens is None else DataSize(max(1, round(tokens / ROW_TOKENS)), ROW_TOKENS)
    assumed = DataSize(UNKNOWN_TOKENS // ROW_TOKENS, ROW_TOKENS)
    steps, total = steps_and_tokens(config, size or assumed, packed=is_packed(config, shape))
    workload = Workload(config, shape, hardware, tokens=total, trained_share=trained_share(config.data))
    found = make_forecast(workload, steps)
    if size is None:
        note = f"the size of {config.data.source} is not known: time is for a million tokens"
        found = replace(found, notes=(*found.notes, note))
    return found


def trained_share(config: DataConfig) -> float:
    """Estimates the share of the tokens that count in the loss, before they are counted."""
    return 1.0 if config.loss_on == "all" else SUMMARY_SHARE
