"""What a training step holds on each GPU, in bytes, by arithmetic alone: no torch, no download.

Every part follows from a model's sizes and from what the fast step keeps for the backward pass; what was measured is in
`benchmarks/`. Owns bytes; knows nothing of speed, prices or how settings are chosen.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields
from heapq import heapify, heapreplace
from itertools import accumulate, pairwise

from qlora_helpers.base.units import BYTES_IN_GIB, gib
from qlora_helpers.model.shapes.sizes import ModelSizes
from qlora_helpers.planning.step_settings import SINGLE, StepSettings, kept_bytes

QUANTISATION_BLOCK, CONSTANTS_BLOCK = 64, 256  # weights a constant, constants a constant of theirs (arXiv:2305.14314)
MEMORY_MARGIN = 0.03  # of the card, left free where the trainer chooses how many layers recompute
LOSS_CHUNK_BYTES = 128 * 1024**2  # of float32 logits; `fast_step.loss` keeps to it
MATRIX_TILE = 128  # tokens that a matrix product works on together
CONTEXT_BYTES = int(0.75 * BYTES_IN_GIB)  # CUDA's own and kernels, outside PyTorch's count; measured on an H100
GRAPHS_BYTES = int(0.1 * BYTES_IN_GIB)  # of the recorded kernels, there too; measured with 30 to 60 layers
RECORDING_ROOM_GIB = (
    0.6  # beside a pass's peak; with 0.5 and less recordings failed and left holes, with 0.7 and more none did
)
FRAGMENTATION_SHARE, FRAGMENTATION_BYTES = 0.02, BYTES_IN_GIB // 16  # of what comes and goes, in segments that grow
RECOMPUTED_FRAGMENTATION_SHARE = 0.2  # of a recomputed layer's work: holes among what is kept; fitted to a Llama
OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
}


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU, by what they are for.

    Attributes:
        weights_quantized: linear layers in 4 bits.
        constants: their quantisation constants.
        weights_other: embeddings, output layer, norms and what else is not quantised.
        adapters, gradients, optimizer: of the adapters, in 32 bits.
        activations: kept from the forward for the backward pass.
        working: the most that lives for a moment: a layer being recomputed, a weight at full width, a chunk of logits.
        fragmentation: reserved by PyTorch beyond what tensors take.
        context: CUDA's own, recorded passes included.
    """

    weights_quantized: int = 0
    constants: int = 0
    weights_other: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    working: int = 0
    fragmentation: int = 0
    context: int = 0

    @property
    def weights(self) -> int:
        return self.weights_quantized + self.constants + self.weights_other

    @property
    def allocated(self) -> int:
        """The peak that `torch.cuda.max_memory_allocated` counts."""
        return self.total - self.fragmentation - self.context

    @property
    def reserved(self) -> int:
        """The peak that `torch.cuda.max_memory_reserved` counts."""
        return self.total - self.context

    @property
    def total(self) -> int:
        """What the card must have free."""
        return (
            self.weights
            + self.adapters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.working
            + self.fragmentation
            + self.context
        )

    def parts_gib(self) -> dict[str, float]:
        """Each part in GiB, by name."""
        return {item.name: gib(getattr(self, item.name)) for item in fields(self)}


def layer_bytes(sizes: ModelSizes, settings: StepSettings) -> GpuMemory:
    """What one decoder layer holds for the whole step; activations as if it were not recomputed."""
    linear, other = sizes.linear_parameters_per_layer, sizes.other_parameters_per_layer
    adapters = settings.adapter_parameters // sizes.blocks
    constants = linear / QUANTISATION_BLOCK
    constants *= 1 + SINGLE / CONSTANTS_BLOCK if settings.double_quantization else SINGLE
    return GpuMemory(
        weights_quantized=linear // 2 if settings.quantized else 0,
        constants=round(constants) if settings.quantized else 0,
        weights_other=settings.value_bytes * (other if settings.quantized else other + linear),
        adapters=SINGLE * adapters,
        gradients=SINGLE * adapters * (2 if settings.copies > 1 else 1),  # DDP sends copies of them
        optimizer=OPTIMIZER_BYTES[settings.optim] * adapters,
        activations=settings.tokens * kept_bytes(sizes, settings),
    )


class StepMemory:
    """What a step holds on each GPU with any number of recomputed layers: what does not depend on it is worked out once.

    Args:
        sizes: of the model.
        settings: of the step; its `checkpointed` does not count.
        gpus: how many hold one copy of the model together.
    """

    def __init__(self, sizes: ModelSizes, settings: StepSettings, gpus: int = 1):
        self.sizes, self.settings, self.gpus = sizes, settings, gpus
        self.layer = layer_bytes(sizes, settings)
        self.layer_input = settings.value_bytes * settings.tokens * sizes.hidden  # all that a recomputed layer keeps
        self.in_backward = _widest_weight(sizes, settings)
        self.in_backward += settings.value_bytes * settings.tokens * _inner_in_backward(sizes)
        self.loss = loss_bytes(sizes, settings)
        offloaded = settings.offloaded and not sizes.tied
        self.on_the_host = settings.value_bytes * sizes.vocab * sizes.hidden if offloaded else 0
        self.without_layers = [float(each.total) for each in self._stages((0,) * gpus, 0)]

    def recomputing(self, checkpointed: int) -> tuple[tuple[int, ...], tuple[GpuMemory, ...]]:
        """Layers and memory of each GPU where so many decoder layers recompute, spread evenly."""
        counts = self.spread(checkpointed)
        return counts, self._stages(counts, checkpointed)

    def _stages(self, counts: tuple[int, ...], checkpointed: int) -> tuple[GpuMemory, ...]:
        again, last = _apportioned(checkpointed, counts), self.gpus - 1
        return tuple(
            self.stage(layers=layers, checkpointed=again[index], first=index == 0, last=index == last)
            for index, layers in enumerate(counts)
        )

    def spread(self, checkpointed: int) -> tuple[int, ...]:
        """How many decoder layers each GPU gets, so that the fullest GPU is as empty as can be."""
        blocks = self.sizes.blocks
        if self.gpus == 1:
            return (blocks,)
        a_layer = self.layer.total - checkpointed / blocks * (self.layer.activations - self.layer_input)
        held = [(empty, index) for index, empty in enumerate(self.without_layers)]
        heapify(held)
        counts = [0] * self.gpus
        for _ in range(blocks):
            bytes_held, emptiest = held[0]
            counts[emptiest] += 1
            heapreplace(held, (bytes_held + a_layer, emptiest))
        return tuple(counts)

    def stage(self, *, layers: int, checkpointed: int, first: bool, last: bool) -> GpuMemory:
        """What a GPU holds that has some of the decoder layers.

        Args:
            layers: decoder layers on this GPU.
            checkpointed: how many of them recompute.
            first: whether the embedding is here.
            last: whether the last layer is here; the output layer is too, or with the embedding that it is tied to.
        """
        sizes, one = self.sizes, self.layer
        head = first if sizes.tied else last
        activations = (layers - checkpointed) * one.activations + checkpointed * self.layer_input
        unquantized = (sizes.other_parameters if first else 0) + (sizes.head_parameters if head else 0)
        offloaded = self.on_the_host if first else 0
        in_layer = self.in_backward + (one.activations if checkpointed else 0)
        working = max(in_layer if layers else 0, self.loss if head else 0)
        working = max(working, offloaded - activations)  # it is on the GPU before the first step and after the last
        fragmentation = FRAGMENTATION_BYTES + FRAGMENTATION_SHARE * (activations + working)
        fragmentation += RECOMPUTED_FRAGMENTATION_SHARE * in_layer if checkpointed else 0
        return GpuMemory(
            weights_quantized=layers * one.weights_quantized,
            constants=layers * one.constants,
            weights_other=layers * one.weights_other + self.settings.value_bytes * unquantized - offloaded,
            adapters=layers * one.adapters,
            gradients=layers * one.gradients,
            optimizer=layers * one.optimizer,
            activations=activations,
            working=working,
            fragmentation=round(fragmentation),
            context=CONTEXT_BYTES + (GRAPHS_BYTES if self.settings.captured else 0),
        )


def _inner_in_backward(sizes: ModelSizes) -> int:
    """Values of an MLP's inner width that exist at once in its backward pass, a token: made again, and their gradients."""
    return sizes.intermediate * (4 if sizes.gated_mlp else 2) * max(1, sizes.experts_per_token)


def _widest_weight(sizes: ModelSizes, settings: StepSettings) -> int:
    """One layer's weight for the moment of its product; DoRA's norms take it and B A in 32 bits, and a unit matrix (peft)."""
    if settings.dora:
        return max(
            SINGLE * layer.in_features * (layer.in_features + 4 * layer.out_features)
            for layer in settings.adapted_layers(sizes)
        )
    if not settings.quantized:
        return 0
    return settings.value_bytes * max((layer.in_features * layer.out_features for layer in sizes.linears), default=0)


def loss_bytes(sizes: ModelSizes, settings: StepSettings) -> int:
    """A chunk of logits as computed and in 32 bits with its slopes, and inputs and gradients of the trained tokens.

    Logits that the model changes itself (soft-capping) are needed whole.
    """
    trained = max(1, round(settings.trained_share * settings.tokens))
    whole = sizes.logit_softcap or not settings.chunked_loss
    chunk = trained if whole else min(trained, loss_chunk(sizes.vocab))
    value = settings.value_bytes
    return chunk * sizes.vocab * (2 * value + 2 * SINGLE) + 2 * trained * sizes.hidden * value


def loss_chunk(vocab: int) -> int:
    """Tokens whose logits over a vocabulary exist at once; whole tiles of a matrix product where there are any."""
    tokens = max(16, LOSS_CHUNK_BYTES // (SINGLE * vocab))
    return tokens - tokens % MATRIX_TILE if tokens >= MATRIX_TILE else tokens


def layers_to_checkpoint(layers: int, checkpointed: int) -> list[int]:
    """Which decoder layers recompute: spread evenly, so that memory rises and falls evenly too."""
    return sorted({round(index * layers / checkpointed) for index in range(checkpointed)}) if checkpointed else []


def predict(
    sizes: ModelSizes, settings: StepSettings, *, gpus: int = 1
) -> tuple[tuple[int, ...], tuple[GpuMemory, ...]]:
    """Layers and memory of each GPU when a model is spread over some.

    Args:
        sizes: of the model.
        settings: of the step; `checkpointed` layers are spread evenly.
        gpus: how many hold one copy of the model together.
    """
    return StepMemory(sizes, settings, gpus).recomputing(settings.checkpointed)


@dataclass(frozen=True)
class Beside:
    """What one GPU would hold otherwise, bytes; to read beside its `GpuMemory`, in no sum.

    Attributes:
        activations_kept, activations_checkpointed: were none of its layers recomputed, or all of them.
        logits: what the loss holds: a chunk of logits with its slopes; 0 where the output layer is elsewhere.
    """

    activations_kept: int
    activations_checkpointed: int
    logits: int


def beside(sizes: ModelSizes, settings: StepSettings, counts: tuple[int, ...]) -> tuple[Beside, ...]:
    """What each GPU would hold with no layer recomputed, with all of them, and what the loss takes.

    Args:
        sizes: of the model.
        settings: of the step.
        counts: decoder layers of each GPU, as `predict` gives them.
    """
    one, given = layer_bytes(sizes, settings).activations, settings.value_bytes * settings.tokens * sizes.hidden
    head = 0 if sizes.tied else len(counts) - 1
    logits = loss_bytes(sizes, settings)
    return tuple(
        Beside(layers * one, layers * given, logits if index == head else 0) for index, layers in enumerate(counts)
    )


def _apportioned(checkpointed: int, counts: tuple[int, ...]) -> list[int]:
    """Recomputed layers on each GPU."""
    chosen = layers_to_checkpoint(sum(counts), checkpointed)
    before = [0, *(bisect_left(chosen, end) for end in accumulate(counts))]
    return [after - earlier for earlier, after in pairwise(before)]
