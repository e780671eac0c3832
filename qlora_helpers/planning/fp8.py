"""Whether a step multiplies frozen weights in FP8: what the settings ask for, and what `auto` makes of a card.

By arithmetic alone, no torch. Whether the card at hand really does it is tried before training, and proved on the loaded model.
"""

from __future__ import annotations

from dataclasses import replace

from qlora_helpers.base.config import TrainConfig
from qlora_helpers.machine.hardware import Gpu
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.planning.speed import step_seconds
from qlora_helpers.planning.step_settings import HALF, StepSettings

WORTH = 0.97  # of the time in bfloat16 that a step in FP8 may take at most, for auto to take it


def takes_fp8(train: TrainConfig, sizes: ModelSizes, step: StepSettings, gpu: Gpu) -> bool:
    """Whether a step multiplies in FP8, as far as is known before it is tried."""
    return fp8_refusal(train, sizes, step, gpu) is None


def with_matmul_dtype(step: StepSettings, train: TrainConfig, sizes: ModelSizes, gpu: Gpu) -> StepSettings:
    """A step that multiplies in FP8 where `takes_fp8` says so."""
    return replace(step, fp8=takes_fp8(train, sizes, step, gpu))


def fp8_refusal(train: TrainConfig, sizes: ModelSizes, step: StepSettings, gpu: Gpu) -> str | None:
    """Why a step multiplies in bfloat16, or None where it multiplies in FP8.

    Args:
        train: training settings.
        sizes: of the model.
        step: what memory and speed depend on; its `fp8` does not count.
        gpu: the card, or one like it.
    """
    if train.matmul_dtype == "bfloat16" or not train.fast_step:
        return "no FP8: the settings ask for none"
    if not step.quantized or step.value_bytes != HALF:
        return "no FP8: it is for weights in 4 bits and values in bfloat16"
    if not gpu.fp8_tflops:
        return f"no FP8: {gpu.name} has none"
    if train.matmul_dtype == "fp8":
        return None
    if not gpu.fp8_measured:
        return f"no FP8: on {gpu.name} it is probed, but was not measured; train.matmul_dtype=fp8 takes it"
    wide, narrow = (step_seconds(sizes, replace(step, compiled=True, fp8=fp8), gpu) for fp8 in (False, True))
    if narrow > WORTH * wide:
        return f"no FP8: a step of this size would take {narrow / wide:.0%} of its time in bfloat16"
    return None


def fp8_notes(train: TrainConfig, gpu: Gpu, chosen: bool) -> list[str]:
    """What a reader must know of a plan's choice."""
    if chosen and not gpu.fp8_measured:
        return [
            f"FP8 on {gpu.name}: probed before training, not measured; its speed is extrapolated from the datasheet"
        ]
    if chosen:
        return [
            f"frozen weights are multiplied in FP8, as measured on {gpu.name}; train.matmul_dtype=bfloat16 does not"
        ]
    if train.matmul_dtype == "fp8" and not gpu.fp8_tflops:
        return [
            f"{gpu.name} has no FP8: training with train.matmul_dtype=fp8 would be refused; figures are of bfloat16"
        ]
    return []
