"""One way to run a training: its settings, with the bytes on each GPU, the speed, time and price that follow from them.

`candidates` makes them. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.units import duration, gib
from qlora_helpers.planning.exchange import Exchange
from qlora_helpers.planning.gpu_memory import GpuMemory, MemoryDetails
from qlora_helpers.planning.layout import COPIES, COPIES_OF_SHARDS, SHARDS, SPREAD, Layout
from qlora_helpers.planning.step_settings import StepSettings

_HOW = {
    COPIES: "a copy on each of {0.copies} GPUs",
    SHARDS: "shards on {0.shards} GPUs",
    COPIES_OF_SHARDS: "{0.copies} copies, each in shards on {0.shards} GPUs",
    SPREAD: "over {0.spread} GPUs",
}


@dataclass(frozen=True)
class Candidate:
    """One way to run the training.

    Attributes:
        step: settings of one forward and backward pass on each GPU, with its `copies` of the model and its `shards`.
        gradient_accumulation_steps: forward passes per optimizer step.
        layers_per_gpu, memory, details: of each GPU on which layers of one copy lie; a single entry where all GPUs hold as much.
        tokens_per_s: over all GPUs, of sequences filled to their end.
        seconds: for the whole data.
        dollars: at the hardware's price; None where it is not known.
        exchange: what the GPUs send each other, and how long they wait for it.
    """

    step: StepSettings
    gradient_accumulation_steps: int
    layers_per_gpu: tuple[int, ...]
    memory: tuple[GpuMemory, ...]
    details: tuple[MemoryDetails, ...]
    tokens_per_s: float
    seconds: float
    dollars: float | None
    exchange: Exchange = Exchange()

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one forward pass on each GPU."""
        return self.step.micro_batch_size

    @property
    def seq_len_tokens(self) -> int:
        """Length of a sequence."""
        return self.step.seq_len_tokens

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return sum(self.layers_per_gpu)

    @property
    def checkpointed(self) -> int:
        """Decoder layers with activation checkpointing."""
        return self.step.checkpointed

    @property
    def compiled(self) -> bool:
        """Whether decoder layers are compiled."""
        return self.step.compiled

    @property
    def captured(self) -> bool:
        """Whether passes are replayed as CUDA graphs."""
        return self.step.captured

    @property
    def fp8(self) -> bool:
        """Whether frozen weights are multiplied in FP8."""
        return self.step.fp8

    @property
    def offloaded(self) -> bool:
        """Whether the input embedding is in the host's memory."""
        return self.step.offloaded

    @property
    def copies(self) -> int:
        """Copies of the whole model."""
        return self.step.copies

    @property
    def layout(self) -> Layout:
        """How the GPUs are used."""
        return Layout(self.step.copies, self.step.shards, len(self.layers_per_gpu))

    @property
    def share(self) -> str:
        """The way in which the GPUs share the work, as `train.share` has it."""
        return self.layout.share

    @property
    def processes(self) -> int:
        """Processes, each of which reads rows of its own."""
        return self.layout.processes

    @property
    def peak_gib(self) -> float:
        """What the fullest GPU must have free, GiB."""
        return max(gib(each.total) for each in self.memory)

    @property
    def optimizer_step_s(self) -> float:
        """Seconds of one optimizer step."""
        return self.step.tokens * self.gradient_accumulation_steps * self.processes / self.tokens_per_s

    @property
    def settings(self) -> list[str]:
        """As `--set` takes them; how several processes share the work is one of them."""
        shared = [f"train.share={self.share}"] if self.processes > 1 else []
        return shared + [
            f"data.seq_len_tokens={self.seq_len_tokens}",
            f"train.micro_batch_size={self.micro_batch_size}",
            f"train.gradient_accumulation_steps={self.gradient_accumulation_steps}",
            f"train.activation_checkpointing={'true' if self.checkpointed else 'false'}",
            f"train.checkpointed_layers={self.checkpointed}",
            f"train.compile={'on' if self.compiled else 'off'}",
            f"train.offload_embeddings={'true' if self.offloaded else 'false'}",
        ]

    def __repr__(self) -> str:
        how = [f"{self.checkpointed} of {self.layers} layers checkpointed"]
        how += ["compiled"] if self.compiled else []
        how += ["as CUDA graphs"] if self.captured else []
        how += ["in FP8"] if self.fp8 else []
        how += ["embedding on the host"] if self.offloaded else []
        how += ["inputs on the host"] if self.step.inputs_on_host and self.checkpointed else []
        how += [_HOW[self.share].format(self.layout)] if self.layout.gpus > 1 else []
        dollars = "" if self.dollars is None else f", ${self.dollars:,.2f}"
        return (
            f"{self.micro_batch_size} x {self.seq_len_tokens} tokens, {self.gradient_accumulation_steps} passes a step, "
            f"{', '.join(how)}: "
            f"{self.peak_gib:.1f} GiB, {self.tokens_per_s:,.0f} tokens/s, {duration(self.seconds)}{dollars}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "seq_len_tokens": self.seq_len_tokens,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "checkpointed": self.checkpointed,
            "layers": self.layers,
            "compiled": self.compiled,
            "captured": self.captured,
            "offloaded": self.offloaded,
            "fp8": self.fp8,
            "share": self.share,
            "copies": self.copies,
            "shards": self.step.shards,
            "processes": self.processes,
            "layers_per_gpu": list(self.layers_per_gpu),
            "memory_gib": [memory.parts_gib() for memory in self.memory],
            "details_gib": [{name: gib(value) for name, value in vars(each).items()} for each in self.details],
            "allocated_gib": [gib(memory.allocated) for memory in self.memory],
            "reserved_gib": [gib(memory.reserved) for memory in self.memory],
            "peak_gib": self.peak_gib,
            "tokens_per_s": self.tokens_per_s,
            "seconds": self.seconds,
            "dollars": self.dollars,
            "settings": self.settings,
        }
