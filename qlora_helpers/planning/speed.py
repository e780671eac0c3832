"""How long a training step takes, in seconds, by arithmetic alone: a roofline whose few constants were fitted to measured steps.

Owns time on one card; knows nothing of memory limits, prices or how settings are chosen. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_helpers.machine.hardware import GPUS, Gpu
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.planning.step_settings import (
    HALF,
    StepSettings,
    kept_by_adapters,
    kept_by_experts,
    kept_scores,
    kept_values,
)

LOOKUP_BYTES_S, SENT_BYTES_S = (
    4e9,
    25e9,
)  # of embeddings in the host's memory: looked up there, sent to the GPU; assumed
DORA_BYTES = 30  # a parameter, for the norm of a weight and its adapter; counted, never measured
COMPILE_S = 30.0  # that the first step takes longer


@dataclass(frozen=True)
class Speed:
    """Constants of the roofline, fitted on one card.

    Attributes:
        matrix_share: of the datasheet's matrix rate that the frozen layers' matrix multiplications reach.
        memory_share: of the datasheet's bandwidth that unpacking 4-bit weights reaches, and everything else that crosses the bus.
        head_operations, value_operations: what attention takes in both directions for a token of a short row, for a head and for
            each of its values, in operations at the datasheet's matrix rate; most of it starts the kernel's many small parts.
        forward_passes, backward_passes: how often the values that a compiled layer keeps cross the memory bus in each direction.
        eager_factor: how much longer all of that takes uncompiled.
        forward_host_s, backward_host_s: time of the host to launch a layer's pass in each direction; a step is never faster than
            the sum of these.
        eager_host_factor: how much longer the host takes where layers are not compiled.
        gaps_s: time that the GPU waits between a layer's kernels in a forward pass; twice that in a backward pass, which has twice
            the kernels.
    """

    matrix_share: float
    memory_share: float
    head_operations: float
    value_operations: float
    forward_passes: float
    backward_passes: float
    eager_factor: float
    forward_host_s: float
    backward_host_s: float
    eager_host_factor: float
    gaps_s: float


FITTED = Speed(
    matrix_share=0.719,
    memory_share=0.54,
    head_operations=1.77e06,
    value_operations=22400,
    forward_passes=2.6,
    backward_passes=4.86,
    eager_factor=2.9,
    forward_host_s=0.00273,
    backward_host_s=0.00691,
    eager_host_factor=1.15,
    gaps_s=0.000319,
)
"""Fitted by `benchmarks/fit_speed.py` to steps of Falcon-40B, Llama 8B and SmolLM2, measured on one H100 80GB; `memory_share`,
`head_operations` and `value_operations` come from kernels that were timed."""
ATTENTION_FORWARD = 0.26  # of attention's time, as its kernels were timed
FP8_MATRIX_SHARE = (
    0.68  # of the datasheet's FP8 rate, as three steps on an H200 took (`benchmarks/fp8_step_speed_one_gpu.json`)
)
WEIGHT_BYTES = 2.5  # that cross the bus for a weight: read in 4 bits, written in 16; counted
FP8_WEIGHT_BYTES = 1.5  # that cross the bus for a weight: read in 4 bits, written in 8; counted
FP8_ROUNDING_BYTES = 3  # for a value that is rounded: read in 16 bits, written in 8; counted
ADDED_BYTES = 4  # for an expert's weight that its adapter is added to: read and written in 16 bits; counted
GRADIENT_BYTES = 6  # for the gradient of that sum: written once, read for A's and for B's gradient; counted
LOSS_BYTES = 64  # that cross the bus for each logit, its part of the sum and its gradient in `fast_step.loss`; counted
UNNAMED_GPU = GPUS["L4"]
"""The card whose speed is assumed where only an amount of memory is known."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one forward and backward pass over a micro-batch on one GPU.

    Attributes:
        on_gpu, on_host: what the GPU computes, and what the host takes to launch it; the step takes the longer of the two.
        forward_s, backward_s: of all decoder layers on the GPU; the latter with what checkpointed layers compute again.
    """

    on_gpu: float
    on_host: float
    forward_s: float
    backward_s: float

    def seconds(self, waits_s: float = 0.0) -> float:
        """Returns what the pass takes, with what the GPU waits for other GPUs."""
        return max(self.on_gpu + waits_s, self.on_host)


def step_seconds(sizes: ModelSizes, step: StepSettings, gpu: Gpu, speed: Speed = FITTED) -> float:
    """Predicts the seconds of one forward and backward pass over a micro-batch on one GPU, or on several one after another."""
    return step_time(sizes, step, gpu, speed).seconds()


def step_time(sizes: ModelSizes, step: StepSettings, gpu: Gpu, speed: Speed = FITTED) -> StepTime:
    """Predicts the parts of one forward and backward pass over a micro-batch.

    Adds up matrix multiplications, dequantisation, attention and what crosses the memory bus. Layers that are spread over several
    GPUs work one after another, so the time is the same for any number of GPUs.
    """
    matrix = gpu.bf16_tflops * 1e12 * speed.matrix_share
    memory = gpu.bandwidth_gb_s * 1e9 * speed.memory_share
    narrow = gpu.fp8_tflops * 1e12 * FP8_MATRIX_SHARE if step.fp8 else matrix
    chosen = sizes.expert_parameters_per_layer * sizes.experts_per_token / max(1, sizes.experts)
    matmuls = 2 * step.tokens * (sizes.linear_parameters_per_layer / narrow + chosen / matrix)
    dequantised = sizes.linear_parameters_per_layer * (FP8_WEIGHT_BYTES if step.fp8 else WEIGHT_BYTES) / memory
    dequantised += sizes.expert_parameters_per_layer * WEIGHT_BYTES / memory  # of all experts, chosen or not
    dequantised *= 1.0 if step.quantized else 0.0
    rounded = step.tokens * FP8_ROUNDING_BYTES / memory if step.fp8 else 0.0  # a value of each token
    inputs = rounded * sum(layer.in_features * layer.per_layer for layer in sizes.linears)
    gradients = rounded * sum(layer.out_features * layer.per_layer for layer in sizes.linears)
    kept = kept_values(sizes, compiled=True, r=step.r, adapted=step.adapted_layers(sizes))
    kept = step.value_bytes * (kept + kept_scores(sizes, step, compiled=True))
    eagerly = step.value_bytes * kept_by_experts(sizes) if step.compiled else kept
    kept += (speed.eager_factor - 1) * eagerly
    values = step.tokens * (kept + kept_by_adapters(sizes, step)) / memory
    norms = DORA_BYTES * sizes.linear_parameters_per_layer / memory if step.dora else 0.0
    added, learned = _experts_adapted(sizes, step, matrix, memory)
    attention = speed.head_operations + speed.value_operations * sizes.head_dim
    attention *= step.tokens * sizes.heads / (gpu.bf16_tflops * 1e12)
    forward = matmuls + dequantised + inputs + norms + values * speed.forward_passes + ATTENTION_FORWARD * attention
    forward += added
    skipped = step.skipped and (gpu.supports_bf16 or step.value_bytes > HALF) and step.fast_adapters and not step.dora
    added_last = sizes.parameters_added_last_per_layer if skipped else 0
    again = forward - (matmuls + dequantised) * added_last / max(1, sizes.linear_parameters_per_layer)
    backward = matmuls + dequantised + gradients + values * speed.backward_passes + (1 - ATTENTION_FORWARD) * attention
    backward += added + learned
    logits = step.trained_share * step.tokens * sizes.vocab
    head = 4 * logits * sizes.hidden / matrix + LOSS_BYTES * logits / memory
    optimizer = 28 * step.adapter_parameters / memory
    gaps = (3 * sizes.layers + step.checkpointed) * speed.gaps_s
    on_gpu = sizes.layers * (forward + backward) + step.checkpointed * again + head + optimizer + gaps
    on_host = (sizes.layers + step.checkpointed) * speed.forward_host_s + sizes.layers * speed.backward_host_s
    on_host *= 1.0 if step.compiled else speed.eager_host_factor
    on_host *= 0.0 if step.captured else 1.0
    if step.offloaded and not sizes.tied:
        looked_up = HALF * step.tokens * sizes.hidden
        on_gpu += looked_up / SENT_BYTES_S
        on_host += looked_up / LOOKUP_BYTES_S
    in_layers = sizes.layers * backward + step.checkpointed * again
    return StepTime(on_gpu, on_host, sizes.layers * forward, in_layers)


def _experts_adapted(sizes: ModelSizes, step: StepSettings, matrix: float, memory: float) -> tuple[float, float]:
    """Returns the seconds that the adapters on one layer's experts take whenever they are added, and for their gradients.

    They are added to all experts, chosen or not; the gradients of the sums come from the tokens, as those of inputs do.
    """
    if not step.on_experts:
        return 0.0, 0.0
    weights = sizes.expert_parameters_per_layer
    chosen = weights * sizes.experts_per_token / max(1, sizes.experts)
    product = 2 * step.r * weights / matrix
    return product + weights * ADDED_BYTES / memory, (
        2 * product + weights * GRADIENT_BYTES / memory + 2 * step.tokens * chosen / matrix
    )


def compile_pays(sizes: ModelSizes, step: StepSettings, gpu: Gpu, passes: int) -> bool:
    """Whether a training run of so many forward passes saves more time than compilation takes."""
    saved = step_seconds(sizes, replace(step, compiled=False), gpu) - step_seconds(
        sizes, replace(step, compiled=True), gpu
    )
    return passes * saved > COMPILE_S
