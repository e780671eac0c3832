"""What a training step holds on each GPU, in bytes, by arithmetic alone: no torch, no download.

Every part follows from a model's sizes and from what the fast step keeps for the backward pass; measurements are in `benchmarks/`.
Owns bytes and memory margins; knows nothing of speed, prices or how settings are chosen.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import replace
from heapq import heapify, heapreplace
from itertools import accumulate, pairwise

from qlora_helpers.base.units import BYTES_IN_GIB
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.planning.gpu_memory import GpuMemory, MemoryDetails
from qlora_helpers.planning.step_settings import SINGLE, StepSettings, kept_bytes, kept_scores

# Weights that share a constant, and constants that share one of their own with double quantisation (arXiv:2305.14314)
QUANTISATION_BLOCK, CONSTANTS_BLOCK = 64, 256
MEMORY_MARGIN = 0.03  # of the card; left free where the trainer chooses how many layers to checkpoint
LOSS_CHUNK_BYTES = 128 * 1024**2  # of float32 logits; `fast_step.loss` keeps to it
MATRIX_TILE = 128  # tokens that a matrix multiplication works on at once
CONTEXT_BYTES = int(0.75 * BYTES_IN_GIB)  # CUDA's own and kernels, which PyTorch does not count; measured on an H100
GRAPHS_BYTES = int(0.1 * BYTES_IN_GIB)  # CUDA graphs, which it does not count either; measured with 30 to 60 layers
# Free beside a pass's peak while it is captured. With 0.5 and less captures failed and left holes, with 0.7 and more none did
CAPTURE_ROOM_GIB = 0.6
# On the GPU, of checkpointed layers whose inputs wait on the host; fitted to a Llama and a Falcon
INPUTS_AT_ONCE = 6
# Of what is allocated for a time, in expandable segments
FRAGMENTATION_SHARE, FRAGMENTATION_BYTES = 0.02, BYTES_IN_GIB // 16
# Decoder layers that are whole on a GPU at once where they are sharded: the one that computes, and the next one in the buffer that
# receives it and in the one that it is copied into (FSDP2)
GATHERED_LAYERS = 3
# Of a checkpointed layer's working memory: holes among what is kept; fitted to a Llama
CHECKPOINTED_FRAGMENTATION_SHARE = 0.2
OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
}
"""State of an adapter's weight, by `TrainConfig.optim`."""


def usable_with_margin(usable_gib: float) -> float:
    """Returns what the trainer plans to fill of a GPU, GiB: all but `MEMORY_MARGIN`."""
    return (1 - MEMORY_MARGIN) * usable_gib


def layer_bytes(sizes: ModelSizes, settings: StepSettings) -> GpuMemory:
    """Counts what one decoder layer holds for the whole step; activations as without checkpointing."""
    in_4_bits, other = sizes.quantized_parameters_per_layer, sizes.other_parameters_per_layer
    adapters = settings.adapter_parameters // sizes.layers
    constants = _constants(in_4_bits, settings)
    in_float32 = (
        (SINGLE - settings.value_bytes) * sizes.float32_parameters / sizes.layers
    )  # those beside the layers too
    return GpuMemory(
        weights_quantized=math.ceil(int(in_4_bits // 2) / settings.shards) if settings.quantized else 0,
        constants=math.ceil(constants / settings.shards) if settings.quantized else 0,
        weights_other=round(settings.value_bytes * (other if settings.quantized else other + in_4_bits) + in_float32),
        adapters=SINGLE * adapters,
        gradients=SINGLE * adapters * (2 if settings.copies * settings.shards > 1 else 1),  # copies of them are sent
        optimizer=OPTIMIZER_BYTES[settings.optim] * adapters,
        activations=round(settings.tokens * kept_bytes(sizes, settings)) + _experts_adapters_kept(sizes, settings),
    )


def _constants(in_4_bits: float, settings: StepSettings) -> int:
    """Counts the bytes of the constants of so many weights in 4 bits."""
    each = 1 + SINGLE / CONSTANTS_BLOCK if settings.double_quantization else SINGLE
    return round(in_4_bits / QUANTISATION_BLOCK * each)


def packed_bytes(sizes: ModelSizes, settings: StepSettings) -> int:
    """Counts the bytes of a whole decoder layer that are shared out where it is sharded: 4-bit weights and their constants."""
    whole = layer_bytes(sizes, replace(settings, shards=1))
    return whole.weights_quantized + whole.constants


class StepMemory:
    """What a step holds on each GPU with any number of checkpointed layers; what does not depend on it is worked out once.

    Args:
        sizes: of the model.
        settings: of the step; its `checkpointed` does not count.
        gpus: how many hold one copy of the model together.
    """

    def __init__(self, sizes: ModelSizes, settings: StepSettings, gpus: int = 1):
        self.sizes, self.settings, self.gpus = sizes, settings, gpus
        self.layer = layer_bytes(sizes, settings)
        self.layer_input = settings.value_bytes * settings.tokens * sizes.hidden  # all that a checkpointed layer keeps
        self.most_inputs = INPUTS_AT_ONCE if settings.inputs_on_host else sizes.layers
        self.in_backward = _widest_weight(sizes, settings) + _experts_in_full(sizes, settings)
        self.in_backward += settings.value_bytes * settings.tokens * _inner_in_backward(sizes)
        self.in_backward += (
            SINGLE * settings.tokens * round(kept_scores(sizes, settings, compiled=True))
        )  # their gradient
        self.loss = loss_bytes(sizes, settings)
        offloaded = settings.offloaded and not sizes.tied
        self.on_the_host = settings.value_bytes * sizes.vocab * sizes.hidden if offloaded else 0
        self.without_layers = [float(each.total) for each in self._stages((0,) * gpus, 0)]

    def with_checkpointed(self, checkpointed: int) -> tuple[tuple[int, ...], tuple[GpuMemory, ...]]:
        """Returns layers and memory of each GPU with so many decoder layers checkpointed, spread evenly."""
        counts = self.spread(checkpointed)
        return counts, self._stages(counts, checkpointed)

    def _stages(self, counts: tuple[int, ...], checkpointed: int) -> tuple[GpuMemory, ...]:
        per_gpu, last = _checkpointed_per_gpu(checkpointed, counts), self.gpus - 1
        return tuple(
            self.stage(layers=layers, checkpointed=per_gpu[index], first=index == 0, last=index == last)
            for index, layers in enumerate(counts)
        )

    def spread(self, checkpointed: int) -> tuple[int, ...]:
        """Returns how many decoder layers each GPU gets, so that the fullest GPU holds as little as possible."""
        total = self.sizes.layers
        if self.gpus == 1:
            return (total,)
        an_input = self.layer_input * min(1.0, self.gpus * self.most_inputs / max(1, checkpointed))
        a_layer = self.layer.total - checkpointed / total * (self.layer.activations - an_input)
        held = [(empty, index) for index, empty in enumerate(self.without_layers)]
        heapify(held)
        counts = [0] * self.gpus
        for _ in range(total):
            bytes_held, emptiest = held[0]
            counts[emptiest] += 1
            heapreplace(held, (bytes_held + a_layer, emptiest))
        return tuple(counts)

    def stage(self, *, layers: int, checkpointed: int, first: bool, last: bool) -> GpuMemory:
        """Counts what a GPU with some of the decoder layers holds.

        Args:
            layers: decoder layers on this GPU.
            checkpointed: how many of them are checkpointed.
            first: whether the embedding is here.
            last: whether the last layer is here; so is the output layer, unless it is tied to the embedding and is there.
        """
        sizes, one = self.sizes, self.layer
        head = first if sizes.tied else last
        inputs = min(checkpointed, self.most_inputs)
        activations = (layers - checkpointed) * one.activations + inputs * self.layer_input
        beside = sizes.other_parameters + sizes.beside_text if first else 0
        packed = sizes.other_quantized + sizes.beside_quantized if first and self.settings.quantized else 0
        unquantized = beside - packed + (sizes.head_parameters if head else 0)
        offloaded = self.on_the_host if first else 0
        in_layer = self.in_backward + (one.activations if checkpointed else 0)
        working = max(in_layer if layers else 0, self.loss if head else 0)
        working = max(
            working, offloaded - activations
        )  # the embedding is on the GPU before the first step and after the last
        fragmentation = FRAGMENTATION_BYTES + FRAGMENTATION_SHARE * (activations + working)
        fragmentation += CHECKPOINTED_FRAGMENTATION_SHARE * in_layer if checkpointed else 0
        return GpuMemory(
            weights_quantized=layers * one.weights_quantized + packed // 2,
            constants=layers * one.constants + _constants(packed, self.settings),
            weights_other=layers * one.weights_other + self.settings.value_bytes * unquantized - offloaded,
            adapters=layers * one.adapters,
            gradients=layers * one.gradients,
            optimizer=layers * one.optimizer,
            activations=activations,
            working=working,
            fragmentation=round(fragmentation),
            context=CONTEXT_BYTES + (GRAPHS_BYTES if self.settings.captured else 0),
            gathered=min(layers, GATHERED_LAYERS) * packed_bytes(sizes, self.settings)
            if self.settings.shards > 1
            else 0,
        )


def _inner_in_backward(sizes: ModelSizes) -> int:
    """Counts inner values of the widest MLP that exist at once in its backward pass, a token: recomputed ones, their gradients."""
    widest = sizes.inner if sizes.widest_inner is None else sizes.widest_inner
    return round(widest * (4 if sizes.gated_mlp else 2))


def _experts_in_full(sizes: ModelSizes, settings: StepSettings) -> int:
    """Counts what the experts of one layer take while they are dequantised, in forward and backward.

    With adapters they are in full where they are not quantised too: the sum of weight and adapter is. In the backward pass the
    gradient of one stack's sum is beside them, until the gradients of its adapters are made of it.
    """
    widest = sizes.expert_parameters_per_layer if sizes.widest_experts is None else sizes.widest_experts
    held = widest if settings.quantized or settings.on_experts else 0
    if settings.on_experts:
        held += max(sizes.experts * each.in_features * each.out_features for each in sizes.expert_stacks)
    return round(settings.value_bytes * held)


def _experts_adapters_kept(sizes: ModelSizes, settings: StepSettings) -> int:
    """Counts the adapters on one layer's experts as they were multiplied, which are kept where they were cast from float32."""
    return settings.value_bytes * (settings.on_experts // sizes.layers) if settings.value_bytes != SINGLE else 0


def _widest_weight(sizes: ModelSizes, settings: StepSettings) -> int:
    """Counts the largest weight while it is dequantised; DoRA's norms (peft) take it, B A and an identity matrix in float32."""
    if settings.dora:
        return max(
            SINGLE * layer.in_features * (layer.in_features + 4 * layer.out_features)
            for layer in settings.adapted_layers(sizes)
        )
    if not settings.quantized:
        return 0
    widest = max((layer.in_features * layer.out_features for layer in sizes.linears), default=0)
    if settings.fp8:  # a byte a weight, and the rows that it is multiplied with
        return widest + settings.tokens * max((layer.out_features for layer in sizes.linears), default=0)
    return settings.value_bytes * widest


def loss_bytes(sizes: ModelSizes, settings: StepSettings) -> int:
    """Counts a chunk of logits, as computed and in float32, with their gradients, and inputs and gradients of the trained tokens.

    Capped logits (soft-capping) also keep what is before the cap.
    """
    trained = max(1, round(settings.trained_share * settings.tokens))
    chunk = min(trained, loss_chunk(sizes.vocab)) if settings.chunked_loss else trained
    value, single = settings.value_bytes, SINGLE * (3 if sizes.logit_softcap else 2)
    return chunk * sizes.vocab * (2 * value + single) + 2 * trained * sizes.hidden * value


def loss_chunk(vocab: int) -> int:
    """Returns how many tokens' logits exist at once: whole tiles of a matrix multiplication where a chunk holds any."""
    tokens = max(16, LOSS_CHUNK_BYTES // (SINGLE * vocab))
    return tokens - tokens % MATRIX_TILE if tokens >= MATRIX_TILE else tokens


def layers_to_checkpoint(layers: int, checkpointed: int) -> list[int]:
    """Returns which decoder layers are checkpointed: spread evenly, so that memory rises and falls evenly too."""
    return sorted({round(index * layers / checkpointed) for index in range(checkpointed)}) if checkpointed else []


def predict(
    sizes: ModelSizes, settings: StepSettings, *, gpus: int = 1
) -> tuple[tuple[int, ...], tuple[GpuMemory, ...]]:
    """Predicts decoder layers and memory of each GPU that holds a part of a model.

    Args:
        sizes: of the model.
        settings: of the step; `checkpointed` layers are spread evenly.
        gpus: how many hold one copy of the model together.

    Returns:
        Decoder layers of each GPU, and its memory.
    """
    return StepMemory(sizes, settings, gpus).with_checkpointed(settings.checkpointed)


def memory_details(sizes: ModelSizes, settings: StepSettings, counts: tuple[int, ...]) -> tuple[MemoryDetails, ...]:
    """Returns what each GPU would hold with no layer checkpointed and with all of them, and what the loss takes.

    Args:
        sizes: of the model.
        settings: of the step.
        counts: decoder layers of each GPU, as `predict` gives them.
    """
    kept, given = layer_bytes(sizes, settings).activations, settings.value_bytes * settings.tokens * sizes.hidden
    head = 0 if sizes.tied else len(counts) - 1
    logits = loss_bytes(sizes, settings)
    return tuple(
        MemoryDetails(layers * kept, layers * given, logits if index == head else 0)
        for index, layers in enumerate(counts)
    )


def _checkpointed_per_gpu(checkpointed: int, counts: tuple[int, ...]) -> list[int]:
    """Counts the checkpointed layers on each GPU."""
    if len(counts) == 1:
        return [checkpointed]
    chosen = layers_to_checkpoint(sum(counts), checkpointed)
    before = [0, *(bisect_left(chosen, end) for end in accumulate(counts))]
    return [after - earlier for earlier, after in pairwise(before)]
