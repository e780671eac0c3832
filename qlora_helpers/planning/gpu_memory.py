"""The bytes on one GPU by what they are for: the result of a prediction. `memory` computes it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qlora_helpers.base.units import gib


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU, by what they are for.

    Attributes:
        weights_quantized: linear layers in 4 bits; this GPU's part of them where they are sharded.
        constants: their quantisation constants, or this GPU's part of them.
        gathered: whole layers with their constants for the time in which they compute, where they are sharded.
        weights_other: embeddings, output layer, norms and what else is not quantised.
        adapters, gradients, optimizer: of the adapters, in float32.
        activations: kept from the forward for the backward pass.
        working: the largest short-lived part: a layer being recomputed, a dequantised weight, a chunk of logits.
        fragmentation: reserved by PyTorch beyond what tensors take.
        context: CUDA's own, CUDA graphs included.
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
    gathered: int = 0

    @property
    def weights(self) -> int:
        """The frozen weights with their constants."""
        return self.weights_quantized + self.constants + self.weights_other

    @property
    def allocated(self) -> int:
        """The peak of `torch.cuda.max_memory_allocated`."""
        return self.total - self.fragmentation - self.context

    @property
    def reserved(self) -> int:
        """The peak of `torch.cuda.max_memory_reserved`."""
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
            + self.gathered
        )

    def parts_gib(self) -> dict[str, float]:
        """Each part in GiB, by name."""
        return {item.name: gib(getattr(self, item.name)) for item in fields(self)}


@dataclass(frozen=True)
class MemoryDetails:
    """What explains one GPU's memory, bytes; no part of its sum.

    Attributes:
        activations_kept, activations_checkpointed: activations with none of its layers checkpointed, and with all of them.
        logits: what the loss holds: a chunk of logits with its gradients; 0 where the output layer is elsewhere.
    """

    activations_kept: int
    activations_checkpointed: int
    logits: int
