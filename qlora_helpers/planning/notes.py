"""The notes below a plan: what the settings and the hardware imply."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import GPUS, Hardware
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.model.shapes.families import packing_refusal
from qlora_helpers.planning.candidate import Candidate
from qlora_helpers.planning.fp8 import fp8_notes
from qlora_helpers.planning.layout import copies_sharing
from qlora_helpers.planning.memory import predict, usable_with_margin
from qlora_helpers.planning.speed import UNNAMED_GPU
from qlora_helpers.planning.step_settings import has_kernels
from qlora_helpers.planning.workload import Workload

SHOWN_GIB = 0.05  # what is less is 0.0 in a note
GRACE_S = 10  # what `docker stop` gives a process to save
_DISTRIBUTIONS = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm"}  # by what is imported
PLAIN_STEP = "train.fast_step is off: what the plain step keeps was counted on a CPU, and its speed is arithmetic"

PADDED = "rows are padded, not packed, and nothing is compiled"

SPREAD = "the layers are spread over the GPUs, which work one after another"


def plan_notes(
    workload: Workload, choice: Candidate | None, smallest: Candidate, *, idle_gpus: bool
) -> tuple[str, ...]:
    """Lists all notes of a plan.

    Args:
        workload: what is trained, and on what.
        choice: the fastest that fits, if anything does.
        smallest: what holds least, fitting or not.
        idle_gpus: whether some GPUs are idle that could hold a copy of the model.
    """
    return (
        *hardware_notes(workload.hardware),
        *model_notes(workload.sizes),
        *(_choice_notes(workload.hardware, choice) if choice else ()),
        *settings_notes(workload),
        *fp8_notes(workload.config.train, workload.gpu, (choice or smallest).fp8),
        *([_sharing_note(workload)] if idle_gpus else []),
        *_fixed_choice_notes(workload, choice or smallest),
    )


def _fixed_choice_notes(workload: Workload, shown: Candidate) -> tuple[str, ...]:
    """Says what the other way would take where every plan makes the same choice."""
    if not workload.config.train.fast_step:
        return ()

    def peak_with(**changes: Any) -> float:
        _, memory = predict(workload.sizes, replace(shown.step, **changes), gpus=len(shown.layers_per_gpu))
        return max(gib(each.total) for each in memory)

    more = peak_with(chunked_loss=False) - shown.peak_gib
    less = max(gib(each.adapters + each.gradients + each.optimizer) for each in shown.memory) / 2
    logits = f"take {more:.1f} GiB more" if more >= SHOWN_GIB else "take no more here"
    masks = shown.peak_gib - peak_with(dropout=False)
    return (
        *(
            [f"dropout keeps a mask for each adapter: adapter.lora_dropout=0 would take {masks:.1f} GiB less"]
            if masks >= SHOWN_GIB
            else []
        ),
        f"the loss is always taken in chunks (the trained tokens' logits at once would {logits}), and adapters are kept in "
        f"float32 (bfloat16 would take {less:.1f} GiB less)",
    )


def _choice_notes(hardware: Hardware, choice: Candidate) -> list[str]:
    """Says what a reader must know of the settings that were chosen."""
    notes = []
    if choice.processes > 1:
        what = "a part of every layer" if choice.step.shards > 1 else "the whole model"
        notes.append(
            f"{choice.processes} processes, each with a GPU and {what} (notebook 07): `ql.start(run)` starts them"
        )
    elif len(choice.layers_per_gpu) > 1:
        notes.append(SPREAD)
    if choice.peak_gib > usable_with_margin(hardware.usable_gib):
        notes.append("tight: little of the card is left; take the next best if it runs out of memory")
    sold = [gpu for gpu in GPUS.values() if hardware.gpu is None and gpu.memory_gib == hardware.usable_gib]
    if smaller := [gpu for gpu in sold if gpu.usable_gib < choice.peak_gib]:
        names = " or ".join(gpu.name for gpu in smaller)
        least = min(gpu.usable_gib for gpu in smaller)
        notes.append(
            f"{hardware.usable_gib:g} GiB are taken as usable, but {names}, sold as {hardware.usable_gib:g}, offers {least:.1f}, "
            "which is too little: name the card"
        )
    if choice.optimizer_step_s > GRACE_S:
        notes.append(
            f"a stop takes effect at the end of an optimizer step: {choice.optimizer_step_s:.0f} s, longer than docker stop waits"
        )
    return notes


def _sharing_note(workload: Workload) -> str:
    """Says what keeps GPUs idle that could each hold a copy of the model."""
    sequences, gpus = workload.sequences_per_step, workload.hardware.gpus
    sharing = copies_sharing(sequences, gpus)
    who = f"{sharing} of {gpus} GPUs, with a copy of the model on each," if sharing > 1 else f"no two of {gpus} GPUs"
    step = "an optimizer step of 1 sequence" if sequences == 1 else f"{sequences} sequences an optimizer step"
    return f"{who} can share {step}; all could with {max(1, round(sequences / gpus)) * gpus}"


def settings_notes(workload: Workload) -> list[str]:
    """Says what a reader must know of figures for these settings."""
    config = workload.config
    notes = [] if config.train.fast_step else [PLAIN_STEP]
    if config.adapter.use_dora:
        notes.append(
            "DoRA: what it keeps was counted on a CPU, and its speed is arithmetic; neither was measured on a GPU"
        )
    if not workload.packed:
        reason = packing_refusal(workload.shape, config.data.seq_len_tokens) if config.data.packing else None
        why = f": {reason}" if reason else ""
        notes.append(PADDED + why)
    if config.model.compute_dtype == "float32":
        notes.append("float32: memory is arithmetic, and the speed is that of bfloat16, which float32 does not reach")
    if workload.sizes.attention_softcap is not None and not workload.step().within_rows:
        notes.append(
            "its attention's scores are capped, which only the fast step on packed rows computes without holding them: they are "
            "held for each pair of tokens; shorter sequences (data.seq_len_tokens) hold fewer; arithmetic, not measured"
        )
    return notes


def hardware_notes(hardware: Hardware) -> list[str]:
    """Says what a reader must know of any figures for this hardware."""
    notes = []
    if hardware.gpu is None:
        notes.append(f"no GPU was named: speed is extrapolated to the datasheet of an {UNNAMED_GPU.name}")
    elif not hardware.gpu.measured:
        notes.append(
            f"speed on {hardware.gpu.name} is extrapolated from its datasheet; only H100 and H200 were measured"
        )
    if hardware.gpu is not None and not hardware.gpu.supports_bf16:
        notes.append(
            f"{hardware.gpu.name} has no bfloat16: matrix multiplications run in float16, and attention without the fast kernel"
        )
    return notes


def _of_recurrent_layers(sizes: ModelSizes) -> str:
    if not sizes.mixer_packages:
        return "their memory and time are arithmetic, not measured"
    names = " and ".join(_DISTRIBUTIONS.get(name, name) for name in sizes.mixer_packages)
    if has_kernels(sizes):
        return f"their memory and time are arithmetic for the kernels of {names}, not measured"
    return (
        f"{names} is not installed here, so memory is that of PyTorch's own operations, which hold several times as much as the "
        "kernels (measured with Qwen3.5 9B, on an H200), and rows are padded; the time is that of the kernels, and longer without "
        "(docs/models.md, Hybrids)"
    )


def model_notes(sizes: ModelSizes) -> list[str]:
    """Says where the sizes come from, and which parts of the model were never measured."""
    notes = []
    if sizes.counted == "built":
        notes.append("its weights were counted on the layers that transformers builds from the config.json")
    if sizes.beside_text:
        notes.append(
            f"{sizes.beside_text:,} weights for pictures and sound are loaded too: they count in the memory, not in the time; the "
            "text part is tuned"
        )
    if sizes.experts:
        notes.append(
            f"a mixture of experts: a token goes through {sizes.experts_per_token} of {sizes.experts}, with "
            f"{sizes.parameters_in_use:,} weights; all are in 4 bits, a layer's are dequantised together; "
            "two mixtures were measured, on an H200"
        )
    if sizes.recurrent_share:
        share = f"{sizes.recurrent_share:.0%} of its layers carry" if sizes.recurrent_share < 1 else "its layers carry"
        notes.append(f"{share} a state along the sequence: {_of_recurrent_layers(sizes)}")
    return notes
