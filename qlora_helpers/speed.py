"""How long a training step takes, in seconds, by arithmetic alone: a roofline whose few constants were fitted to measured steps.

Owns time on one card; knows nothing of memory limits, prices or how settings are chosen. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_helpers.architectures import ModelSizes
from qlora_helpers.catalog import GPUS, Gpu
from qlora_helpers.step_settings import HALF, StepSettings, kept_by_adapters, kept_values

LOOKUP_BYTES_S, LOOKUP_S = 4e9, 0.003  # of embeddings in the host's memory, and the GPU's wait for them; assumed
LOOKUP_HOST_S = 0.09  # where the host sets the pace; from one step in two calls, when the host still waited for tokens
DORA_BYTES = 30  # a parameter, for the norm of a weight and its adapter; counted, never measured
COMPILE_S = 30.0  # what the first step takes longer


@dataclass(frozen=True)
class Speed:
    """Constants of the roofline, fitted on one card.

    Attributes:
        matrix_share: of the datasheet's matrix rate that the frozen layers' products reach.
        memory_share: of the datasheet's bandwidth that everything else reaches.
        forward_passes, backward_passes: how often the values that a layer keeps cross the memory bus in each direction, compiled.
        eager_factor: how much longer all of that takes uncompiled.
        forward_host_s, backward_host_s: what the host takes to start a layer's pass in each direction; a step is never faster
            than all of these.
        eager_host_factor: how much longer the host takes where layers are not compiled.
    """

    matrix_share: float
    memory_share: float
    forward_passes: float
    backward_passes: float
    eager_factor: float
    forward_host_s: float
    backward_host_s: float
    eager_host_factor: float


FITTED = Speed(
    matrix_share=0.644,
    memory_share=0.563,
    forward_passes=5.05,
    backward_passes=5.17,
    eager_factor=1.98,
    forward_host_s=0.0025,
    backward_host_s=0.0073,
    eager_host_factor=1.12,
)
"""Fitted by `benchmarks/fit_speed.py` to steps of Falcon-40B, a Llama of 8 B and SmolLM2, measured on one H100 80GB.

The first five come from fewer steps; a fit to all of them moves no prediction by more than 6 %.
"""
UNNAMED_GPU = GPUS["L4"]
"""Stands in for the speed of a card of which only the memory is known."""


def step_seconds(sizes: ModelSizes, step: StepSettings, gpu: Gpu, speed: Speed = FITTED) -> float:
    """One forward and backward pass over a micro-batch, seconds: products, dequantisation, and what crosses the memory bus.

    Layers spread over several GPUs work one after another, so it is the same for any number of them.
    """
    matrix = gpu.bf16_tflops * 1e12 * speed.matrix_share
    memory = gpu.bandwidth_gb_s * 1e9 * speed.memory_share
    weights = sizes.linear_parameters_per_block + sizes.expert_parameters_per_block * sizes.experts_per_token / max(
        1, sizes.experts
    )
    products = 2 * step.tokens * weights / matrix
    dequantised = sizes.linear_parameters_per_block * 2.5 / memory if step.quantized else 0.0
    kept = step.value_bytes * kept_values(sizes, compiled=True, r=step.r, adapted=step.adapted_layers(sizes))
    kept *= 1.0 if step.compiled else speed.eager_factor
    values = step.tokens * (kept + kept_by_adapters(sizes, step)) / memory
    norms = DORA_BYTES * sizes.linear_parameters_per_block / memory if step.dora else 0.0
    forward = products + dequantised + norms + values * speed.forward_passes
    backward = products + dequantised + values * speed.backward_passes
    head = 4 * step.trained_share * step.tokens * sizes.vocab * sizes.hidden / matrix
    optimizer = 28 * step.adapter_parameters / memory
    on_gpu = (sizes.blocks + step.recomputed) * forward + sizes.blocks * backward + head + optimizer
    on_host = (sizes.blocks + step.recomputed) * speed.forward_host_s + sizes.blocks * speed.backward_host_s
    on_host *= 1.0 if step.compiled else speed.eager_host_factor
    if step.offloaded and not sizes.tied:
        on_gpu += HALF * step.tokens * sizes.hidden / LOOKUP_BYTES_S + LOOKUP_S
        on_host += LOOKUP_HOST_S
    return max(on_gpu, on_host)


def compile_pays(sizes: ModelSizes, step: StepSettings, gpu: Gpu, passes: int) -> bool:
    """Whether a training run of so many forward passes wins back the time that compilation takes."""
    saved = step_seconds(sizes, replace(step, compiled=False), gpu) - step_seconds(
        sizes, replace(step, compiled=True), gpu
    )
    return passes * saved > COMPILE_S
