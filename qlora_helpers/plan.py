"""The fastest settings that fit, their time and price, and the next best: by arithmetic, before a byte is downloaded.

Takes a model's `config.json`, the hardware and a run's settings; tries every micro-batch and every number of recomputed layers.
Bytes are `memory`'s, seconds `speed`'s. Imports no torch; knows nothing of runs on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qlora_helpers.architectures import ModelSizes
from qlora_helpers.catalog import INSTANCES, Hardware, parse_gpus
from qlora_helpers.config import RunConfig
from qlora_helpers.memory import GpuMemory, StepSettings, predict, step_settings
from qlora_helpers.model_sizes import model_sizes
from qlora_helpers.speed import COMPILE_S, UNNAMED_GPU, step_seconds
from qlora_helpers.tables import Table
from qlora_helpers.units import duration, gib

BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
SPREAD = "the layers are spread over the GPUs, which work one after another"
COPIES_EFFICIENCY = 0.95  # assumed: several processes wait for each other and average gradients; adapters are small


@dataclass(frozen=True)
class Candidate:
    """One way to run the training.

    Attributes:
        blocks, accumulation: micro-batch on each GPU, and forward passes per optimizer step.
        recomputed: decoder layers that recompute their activations, of `layers`.
        compiled: whether layers are compiled.
        offloaded: whether the input embedding lies in the host's memory.
        copies: processes that each hold the whole model (torchrun); 1 where the layers are spread over the GPUs.
        layers_per_gpu, memory: of each GPU that holds a part of one copy.
        seq_len_tokens: length of a block.
        tokens_per_s: over all GPUs, of blocks filled to their end.
        seconds: for the whole data.
        dollars: at the hardware's price; None where it is not known.
    """

    blocks: int
    accumulation: int
    recomputed: int
    layers: int
    compiled: bool
    offloaded: bool
    copies: int
    layers_per_gpu: tuple[int, ...]
    memory: tuple[GpuMemory, ...]
    seq_len_tokens: int
    tokens_per_s: float
    seconds: float
    dollars: float | None

    @property
    def peak_gib(self) -> float:
        """What the fullest GPU must have free, GiB."""
        return max(gib(each.total) for each in self.memory)

    @property
    def settings(self) -> list[str]:
        """As `--set` takes them."""
        return [
            f"data.seq_len_tokens={self.seq_len_tokens}",
            f"train.micro_batch_size={self.blocks}",
            f"train.gradient_accumulation_steps={self.accumulation}",
            f"train.activation_checkpointing={'true' if self.recomputed else 'false'}",
            f"train.recompute_layers={self.recomputed}",
            f"train.compile={'on' if self.compiled else 'off'}",
            f"train.offload_embeddings={'true' if self.offloaded else 'false'}",
        ]

    def __repr__(self) -> str:
        how = [f"{self.recomputed} of {self.layers} layers recomputed"]
        how += ["compiled"] if self.compiled else []
        how += ["embedding on the host"] if self.offloaded else []
        dollars = "" if self.dollars is None else f", ${self.dollars:,.2f}"
        return (
            f"{self.blocks} x {self.seq_len_tokens} tokens, {self.accumulation} a step, {', '.join(how)}: "
            f"{self.peak_gib:.1f} GiB, {self.tokens_per_s:,.0f} tokens/s, {duration(self.seconds)}{dollars}"
        )


@dataclass(frozen=True)
class Plan:
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
        mends: where nothing fits, the smallest changes that would, each with its text.
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
    mends: tuple[str, ...] = ()
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
            "model": self.model, "parameters": self.sizes.parameters, "trainable_parameters": self.adapter_parameters,
            "hardware": self.hardware.label, "gpus": self.hardware.gpus, "usable_gib": self.hardware.usable_gib,
            "price_usd_per_hour": self.hardware.price_usd_per_hour, "price_note": self.hardware.price_note,
            "tokens": self.tokens, "fits": self.fits, "shortfall_gib": round(self.shortfall_gib, 3),
            "choice": _as_dict(self.choice), "alternatives": [_as_dict(each) for each in self.alternatives],
            "smallest": _as_dict(self.smallest), "mends": list(self.mends), "notes": list(self.notes),
        }  # fmt: skip

    def __repr__(self) -> str:
        shown = self.choice or self.smallest
        lines = [
            f"{self.model} on {self.hardware.label}: {self.sizes.parameters:,} parameters, "
            f"{self.adapter_parameters:,} trained",
            repr(_memory_table(shown, self.hardware)),
        ]
        if self.choice:
            lines.append(f"fastest that fits  {self.choice!r}")
            lines += [f"next best          {each!r}" for each in self.alternatives]
        else:
            lines.append(f"does not fit: {self.shortfall_gib:.1f} GiB too much on the fullest GPU, at {shown!r}")
            lines += [f"would fit: {mend}" for mend in self.mends]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def make_plan(
    model: str, shape: dict[str, Any], hardware: Hardware, config: RunConfig, *, tokens: int, trained_share: float = 0.2,
    one_process: bool = False, mend: bool = True,
) -> Plan:  # fmt: skip
    """Plans a training run.

    Args:
        model: its name, for the reader.
        shape: its `config.json`.
        hardware: the GPUs, with their price.
        config: adapter, optimizer, block length and blocks an optimizer step are taken from here; what is left is chosen.
        tokens: that are trained on in one epoch.
        trained_share: of the tokens.
        one_process: leaves out a copy of the model on each of several GPUs, which takes torchrun.
        mend: whether to look for changes that fit, where nothing does.

    Raises:
        ModelError: the shape lacks a size, or a target layer is unknown.
    """
    total = round(tokens * config.train.epochs)
    found = _candidates(shape, hardware, config, total, trained_share, (hardware.gpus,) if one_process else None)
    best: dict[int, Candidate] = {}  # the fastest of each micro-batch, fastest first
    for each in sorted(_fitting(found, hardware), key=lambda each: -each.tokens_per_s):
        best.setdefault(each.blocks, each)
    choice, *others = list(best.values()) or [None]
    sizes = model_sizes(shape)
    step = step_settings(config, shape, blocks=1, trained_share=trained_share)
    return Plan(
        model, sizes, step.adapter_parameters, hardware, total, choice, tuple(others[:2]),
        smallest=min(found, key=lambda each: each.peak_gib),
        mends=() if choice or not mend else _mends(shape, hardware, config, total, trained_share),
        notes=_notes(hardware, sizes, choice),
    )  # fmt: skip


def fastest_in_several_processes(
    shape: dict[str, Any], hardware: Hardware, config: RunConfig, tokens: int, trained_share: float
) -> Candidate | None:
    """The fastest that fits with a copy of the model on each GPU (torchrun); None where there is one GPU, or nothing fits."""
    if hardware.gpus == 1:
        return None
    fitting = _fitting(_candidates(shape, hardware, config, tokens, trained_share, (1,)), hardware)
    return max(fitting, key=lambda each: each.tokens_per_s, default=None)


def _candidates(
    shape: dict[str, Any], hardware: Hardware, config: RunConfig, tokens: int, trained_share: float,
    shares: tuple[int, ...] | None = None,
) -> list[Candidate]:  # fmt: skip
    """Every micro-batch that makes up the asked blocks an optimizer step, with as many GPUs a copy as `shares` says.

    Where it says nothing: one copy over all GPUs, or a copy on each.
    """
    per_step = config.train.micro_batch_size * config.train.gradient_accumulation_steps
    found, sizes = [], model_sizes(shape)
    places = embedding_places(sizes, config)
    for gpus in shares or sorted({1, hardware.gpus}):
        copies = hardware.gpus // gpus
        for blocks in [count for count in BLOCKS if per_step % (count * copies) == 0] or [1]:
            step = step_settings(config, shape, blocks=blocks, trained_share=trained_share)
            accumulation = max(1, per_step // (blocks * copies))
            found += _with_least_recomputation(sizes, step, hardware, tokens, gpus, accumulation, places)
    return found


def embedding_places(sizes: ModelSizes, config: RunConfig) -> tuple[bool, ...]:
    """Whether the input embedding may be in the host's memory: not where it is the output layer, nor without the fast step."""
    return (False,) if sizes.tied or not config.train.fast_step else (False, True)


def _with_least_recomputation(
    sizes: ModelSizes, step: StepSettings, hardware: Hardware, tokens: int, gpus: int, accumulation: int,
    places: tuple[bool, ...],
) -> list[Candidate]:  # fmt: skip
    """The fewest recomputed layers that fit, and all of them, with the embedding in each place."""
    found = []
    for offloaded in places:
        placed = replace(step, offloaded=offloaded)
        counts = {fewest_recomputed(sizes, placed, hardware.usable_gib, gpus=gpus), sizes.blocks}
        found += [
            _candidate(sizes, replace(placed, recomputed=count), hardware, tokens, gpus, accumulation)
            for count in counts
        ]
    return found


def fewest_recomputed(sizes: ModelSizes, step: StepSettings, usable_gib: float, *, gpus: int = 1) -> int:
    """How many decoder layers must recompute their activations to fit; all of them where even that does not.

    Args:
        sizes: of the model.
        step: its `recomputed` does not count.
        usable_gib: of each GPU, the CUDA context included.
        gpus: how many hold one copy of the model together.
    """
    fewest, most = 0, sizes.blocks
    while fewest < most:  # memory falls with every layer that recomputes
        middle = (fewest + most) // 2
        _, memory = predict(sizes, replace(step, recomputed=middle), gpus=gpus)
        if max(gib(each.total) for each in memory) <= usable_gib:
            most = middle
        else:
            fewest = middle + 1
    return fewest


def together(copies: int) -> float:
    """How many times as fast several processes are as one."""
    return 1.0 if copies == 1 else copies * COPIES_EFFICIENCY


def _candidate(
    sizes: ModelSizes, step: StepSettings, hardware: Hardware, tokens: int, gpus: int, accumulation: int
) -> Candidate:
    copies = hardware.gpus // gpus
    rates = {
        compiled: together(copies)
        * step.tokens
        / step_seconds(sizes, replace(step, compiled=compiled), hardware.gpu or UNNAMED_GPU)
        for compiled in (True, False)
    }
    seconds = {True: COMPILE_S + tokens / rates[True], False: tokens / rates[False]}
    compiled = seconds[True] < seconds[False]
    layers, memory = predict(sizes, replace(step, compiled=compiled), gpus=gpus)
    price = hardware.price_usd_per_hour
    return Candidate(
        blocks=step.blocks, accumulation=accumulation, recomputed=step.recomputed, layers=sizes.blocks, compiled=compiled,
        offloaded=step.offloaded, copies=copies, layers_per_gpu=layers, memory=memory, seq_len_tokens=step.seq_len_tokens,
        tokens_per_s=rates[compiled], seconds=seconds[compiled],
        dollars=None if price is None else price * seconds[compiled] / 3600,
    )  # fmt: skip


def _mends(
    shape: dict[str, Any], hardware: Hardware, config: RunConfig, tokens: int, trained_share: float
) -> tuple[str, ...]:
    """The smallest change of the settings that fits, and the cheapest instance that does."""
    found = []
    if change := smallest_change(shape, hardware, config, tokens, trained_share):
        settings, best = change
        found.append(" ".join(f"--set {item}" for item in settings) + f" ({best!r})")
    if other := cheapest_instance(shape, config, trained_share):
        found.append(f"{other.label}, ${other.price_usd_per_hour:.2f} an hour; {other.price_note}")
    return tuple(found)


def smallest_change(
    shape: dict[str, Any], hardware: Hardware, config: RunConfig, tokens: int, trained_share: float,
    one_process: bool = False,
) -> tuple[list[str], Candidate] | None:  # fmt: skip
    """The mildest change of block length, optimizer and rank with which something fits, and the fastest that then does."""
    for change in _changes(config):
        changed = config.with_settings(change)
        shares = (hardware.gpus,) if one_process else None
        fitting = _fitting(_candidates(shape, hardware, changed, tokens, trained_share, shares), hardware)
        if fitting:
            return change, max(fitting, key=lambda each: each.tokens_per_s)
    return None


def cheapest_instance(shape: dict[str, Any], config: RunConfig, trained_share: float) -> Hardware | None:
    """The catalogue's cheapest instance by the hour on which something fits."""
    priced = [parse_gpus(name) for name, instance in INSTANCES.items() if instance.price_usd_per_hour is not None]
    for other in sorted(priced, key=lambda each: each.price_usd_per_hour):
        if _can_fit(shape, other, config, trained_share):
            return other
    return None


def _can_fit(shape: dict[str, Any], hardware: Hardware, config: RunConfig, trained_share: float) -> bool:
    """Whether something fits even uncompiled: the smallest micro-batch, with no layer recomputed or with all of them."""
    per_step, sizes = config.train.micro_batch_size * config.train.gradient_accumulation_steps, model_sizes(shape)
    for gpus in sorted({1, hardware.gpus}):
        copies = hardware.gpus // gpus
        blocks = next((count for count in BLOCKS if per_step % (count * copies) == 0), 1)
        step = step_settings(config, shape, blocks=blocks, compiled=False, trained_share=trained_share)
        for recomputed in (0, sizes.blocks):
            _, memory = predict(
                sizes,
                replace(step, recomputed=recomputed, offloaded=recomputed > 0 and config.train.fast_step),
                gpus=gpus,
            )
            if max(gib(each.total) for each in memory) <= hardware.usable_gib:
                return True
    return False


def _changes(config: RunConfig) -> list[list[str]]:
    """Changes from the mildest on: shorter blocks, an optimizer of 8 bits, a lower rank, and these together."""
    lengths = [
        f"data.seq_len_tokens={length}" for length in (1024, 512, 256)
        if config.evaluation.max_new_tokens < length < config.data.seq_len_tokens
    ]  # fmt: skip
    rank = [f"adapter.r={r}" for r in (8,) if r < config.adapter.r]
    eight_bit = ["train.optim=adamw_8bit"]
    singles = [[length] for length in lengths] + [eight_bit] + [[each] for each in rank]
    return singles + [[lengths[-1], *eight_bit, *rank]] if lengths else singles


def _fitting(candidates: list[Candidate], hardware: Hardware) -> list[Candidate]:
    return [each for each in candidates if each.peak_gib <= hardware.usable_gib]


def _notes(hardware: Hardware, sizes: ModelSizes, choice: Candidate | None) -> tuple[str, ...]:
    notes = []
    if choice and choice.copies > 1:
        notes.append(f"{choice.copies} processes, each with the whole model (notebook 07, torchrun)")
    elif choice and len(choice.layers_per_gpu) > 1:
        notes.append(SPREAD)
    return (*hardware_notes(hardware, sizes), *notes)


def hardware_notes(hardware: Hardware, sizes: ModelSizes) -> list[str]:
    """What a reader must know of any figures for this hardware and model."""
    notes = []
    if hardware.gpu is None:
        notes.append(f"no GPU was named: speed is extrapolated to the datasheet of an {UNNAMED_GPU.name}")
    elif not hardware.gpu.measured:
        notes.append(f"speed on {hardware.gpu.name} is extrapolated from its datasheet; only H100 was measured")
    if hardware.gpu is not None and not hardware.gpu.supports_bf16:
        notes.append(f"{hardware.gpu.name} has no bfloat16: products run in float16, attention without the fast kernel")
    if sizes.experts:
        notes.append("experts are not quantised when they are loaded, so most weights stay in 16 bits")
    if sizes.assumed:
        notes.append("an unknown architecture, taken to be wired like Llama")
    return notes


def _memory_table(shown: Candidate, hardware: Hardware) -> Table:
    parts = [each.parts_gib() for each in shown.memory]
    rows = [[name.replace("_", " "), *(f"{each[name]:.2f}" for each in parts)] for name in parts[0]]
    rows.append(["in all", *(f"{gib(each.total):.2f}" for each in shown.memory)])
    rows.append(["usable", *(f"{hardware.usable_gib:.2f}" for _ in parts)])
    labels = [f"GPU {index} ({layers} layers)" for index, layers in enumerate(shown.layers_per_gpu)]
    return Table(["GiB", *labels], rows, numbers=range(1, len(labels) + 1))


def _as_dict(each: Candidate | None) -> dict[str, Any] | None:
    if each is None:
        return None
    return {
        "blocks": each.blocks, "seq_len_tokens": each.seq_len_tokens, "accumulation": each.accumulation,
        "recomputed": each.recomputed, "layers": each.layers, "compiled": each.compiled, "offloaded": each.offloaded,
        "copies": each.copies, "layers_per_gpu": list(each.layers_per_gpu),
        "memory_gib": [memory.parts_gib() for memory in each.memory],
        "allocated_gib": [gib(memory.allocated) for memory in each.memory],
        "reserved_gib": [gib(memory.reserved) for memory in each.memory], "peak_gib": each.peak_gib,
        "tokens_per_s": each.tokens_per_s, "seconds": each.seconds, "dollars": each.dollars, "settings": each.settings,
    }  # fmt: skip
