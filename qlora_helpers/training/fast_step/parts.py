"""The fast training step: parts that each make a step faster without changing what is learned.

`fast_step` goes through `PARTS` in order, opens each part that is asked for and can run, and notes why another can't. Knows
nothing of data sources, runs or settings.

To add a part, write its context manager and its refusal in a module of this folder, and add one `Part` to `PARTS`:

- before the `CHECK` entry if it changes how values are computed: the check before training then compares its losses with the
  plain path's. After it, if it is expensive to open or changes no value, such as compilation;
- `open` changes the model while it is open and leaves it as it was. What it yields is kept in the `FastStep` under the part's
  name (True where it yields None), and may hold a `refusal` that becomes known only while training;
- where a setting asks for the part, that is one more field of `StepRequest`; where the batches depend on the part, one more
  field of `FastStep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from qlora_helpers.model.host_embedding import embeddings_on_host, offload_refusal, restore_embedding
from qlora_helpers.model.shapes.families import has_dropout
from qlora_helpers.model.wiring import base_model_of, decoder_layers
from qlora_helpers.training.fast_step.adapters import weights_cast_in_place_of_activations
from qlora_helpers.training.fast_step.block_diagonal import block_diagonal_attention, block_diagonal_refusal
from qlora_helpers.training.fast_step.fp8 import Fp8Matmuls, fp8_matmuls, fp8_refusal
from qlora_helpers.training.fast_step.graphs import CapturedPasses, graph_refusal, passes_captured
from qlora_helpers.training.fast_step.layers import compile_refusal, inner_hooks_disabled, layers_changed
from qlora_helpers.training.fast_step.loss import ChunkedLoss, chunked_loss_refusal, loss_in_chunks

__all__ = ["PARTS", "FastStep", "Part", "StepRequest", "fast_step"]


@dataclass
class FastStep:
    """The parts of the fast step that are on. A part without a field here has an attribute of its name once it is open.

    Attributes:
        block_diagonal: whether batches carry the starts of their rows instead of a mask.
        loss: the loss in chunks, or None where the model's own is used.
        adapters: how many adapted layers cast weights instead of activations.
        fp8: the layers that multiply in FP8, or None where none does.
        compiled: whether the decoder layers are compiled.
        graphs: the passes that are captured as CUDA graphs, or None where none may be.
        offloaded: what looks up a batch's tokens in an embedding in the host's memory; None where it is on the GPU.
        checkpointed, layers: how many decoder layers have activation checkpointing, of how many.
        inputs_on_host: whether the inputs of these layers wait in the host's memory.
        skipped: how many unused outputs such a layer skips while it recomputes.
        reasons: why a part is off, as known when the step was opened.
    """

    block_diagonal: bool = False
    loss: ChunkedLoss | None = None
    adapters: int = 0
    fp8: Fp8Matmuls | None = None
    compiled: bool = False
    graphs: CapturedPasses | None = None
    offloaded: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    checkpointed: int = 0
    layers: int = 0
    inputs_on_host: bool = False
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)

    def is_on(self, name: str) -> bool:
        """Whether a part is open and has not been refused since."""
        value = getattr(self, name, None)
        return bool(value) and not getattr(value, "refusal", None)

    @property
    def capturing(self) -> bool:
        """Whether passes are captured, as far as is known: what can't be captured shows when it is tried."""
        return self.is_on("graphs")

    @property
    def why_off(self) -> list[str]:
        """Why parts are off, including what became known while training."""
        later = [getattr(getattr(self, part.name, None), "refusal", None) for part in PARTS]
        return [*self.reasons, *(reason for reason in later if reason)]

    def __repr__(self) -> str:
        lines = [
            f"{'on ' if self.is_on(part.name) else 'off'}  {part.label.format(getattr(self, part.name, 0))}"
            for part in PARTS
            if part.label and (part.listed_when_off or self.is_on(part.name))
        ]
        skipping = ", their inputs in the host's memory" if self.inputs_on_host and self.checkpointed else ""
        skipping += f", each skipping {self.skipped} unused outputs" if self.skipped else ""
        lines.append(f"     {self.checkpointed} of {self.layers} layers with activation checkpointing{skipping}")
        return "\n".join(lines + [f"     ({reason})" for reason in self.why_off])


@dataclass(frozen=True)
class StepRequest:
    """What is asked of the fast step.

    Attributes:
        model: a peft model.
        packed: whether sequences are packed with several rows, all of one length.
        longest: an upper bound on a row's tokens.
        compiled: whether the run is long enough for compilation to pay.
        checkpointed: how many decoder layers get activation checkpointing; None for all.
        captured: whether passes are captured as CUDA graphs where they can be.
        accumulation: forward passes per optimizer step.
        offload_embeddings: whether the input embedding goes into the host's memory.
        offload_checkpoints: whether the inputs of layers with activation checkpointing wait in the host's memory.
        fp8: whether frozen 4-bit weights are multiplied in FP8.
    """

    model: torch.nn.Module
    packed: bool
    longest: int
    compiled: bool
    checkpointed: int | None
    captured: bool = False
    accumulation: int = 1
    offload_embeddings: bool = False
    offload_checkpoints: bool = False
    fp8: bool = False

    @cached_property
    def inner(self) -> torch.nn.Module:
        """The transformers model, without peft's wrapper around it."""
        return base_model_of(self.model)

    @property
    def dropout(self) -> bool:
        """Whether a pass draws random numbers, by modules or by functions."""
        by_modules = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in self.model.modules())
        return by_modules or has_dropout(self.inner.config.get_text_config().to_dict())


@dataclass(frozen=True)
class Part:
    """One part of the fast step.

    Attributes:
        name: the attribute of `FastStep` that keeps what `open` yields.
        open: makes the context manager that changes the model while it is open; sees the parts that are on already.
        label: its line in the report, in which `{}` is what `open` yielded; empty for none.
        asked: whether the request asks for it. A part that is not asked for is off without a reason.
        refusal: why it can't run with this model on this machine, or None where it can.
        listed_when_off: whether the report lists it where it is off, too.
    """

    name: str
    open: Callable[[StepRequest, FastStep], AbstractContextManager[Any]]
    label: str = ""
    asked: Callable[[StepRequest], bool] = lambda request: True
    refusal: Callable[[StepRequest, FastStep], str | None] = lambda request, on: None
    listed_when_off: bool = True


def _compile_refusal(request: StepRequest, on: FastStep) -> str | None:
    if not request.packed:
        return "padded rows differ in length: nothing is compiled"
    return compile_refusal(request.inner.get_input_embeddings().weight.device, request.inner.dtype)


CHECK = Part("check", lambda request, on: nullcontext())
"""Where the check before training runs: after the parts that change how values are computed, before anything is compiled."""

PARTS = (
    Part(
        "hooks_disabled",
        lambda request, on: inner_hooks_disabled(decoder_layers(request.inner)),
    ),
    Part(
        "offloaded",
        lambda request, on: embeddings_on_host(request.inner),
        label="input embedding in the host's memory",
        asked=lambda request: request.offload_embeddings,
        refusal=lambda request, on: offload_refusal(request.inner),
        listed_when_off=False,
    ),
    Part(
        "block_diagonal",
        lambda request, on: block_diagonal_attention(request.inner, longest=request.longest, say=on.reasons.append),
        label="block-diagonal attention without a mask",
        asked=lambda request: request.packed,
        refusal=lambda request, on: block_diagonal_refusal(request.inner, request.longest),
    ),
    Part(
        "loss",
        lambda request, on: loss_in_chunks(request.inner),
        label="loss in chunks",
        refusal=lambda request, on: chunked_loss_refusal(request.inner),
    ),
    Part(
        "adapters",
        lambda request, on: weights_cast_in_place_of_activations(request.model),
        label="{} adapters in float32 that compute in the model's type",
    ),
    Part(
        "fp8",
        lambda request, on: fp8_matmuls(request.inner),
        label="{} frozen linear layers multiplied in FP8",
        asked=lambda request: request.fp8,
        refusal=lambda request, on: fp8_refusal(request.inner),
        listed_when_off=False,
    ),
    CHECK,
    Part(
        "compiled",
        lambda request, on: nullcontext(True),  # the next part compiles
        label="layers compiled",
        asked=lambda request: request.compiled,
        refusal=_compile_refusal,
    ),
    Part(
        "skipped",
        lambda request, on: layers_changed(
            request.inner,
            compiled=on.compiled,
            checkpointed=on.checkpointed,
            keep_random_state=request.dropout,
            on_host=request.offload_checkpoints,
        ),
    ),
    Part(
        "graphs",
        lambda request, on: passes_captured(
            request.model, passes_before=request.accumulation + 1, prepare=on.offloaded
        ),
        label="passes captured as CUDA graphs",
        asked=lambda request: request.captured,
        refusal=lambda request, on: graph_refusal(
            request.model, packed=request.packed, dropout=request.dropout, listed=on.loss is not None
        ),
    ),
)
"""In the order in which they are opened, and closed in reverse."""


@contextmanager
def fast_step(
    model: torch.nn.Module, *, check: Callable[[FastStep], None] = lambda on: None, **request: Any
) -> Iterator[FastStep]:
    """Opens all parts that can run, around one session of training.

    Args:
        model: a peft model.
        check: called before anything is compiled; may raise.
        request: the fields of `StepRequest`.
    """
    asked = StepRequest(model, **request)
    restore_embedding(asked.inner.get_input_embeddings())
    on = FastStep(layers=len(decoder_layers(asked.inner)), inputs_on_host=asked.offload_checkpoints)
    on.checkpointed = on.layers if asked.checkpointed is None else min(asked.checkpointed, on.layers)
    with ExitStack() as opened:
        for part in PARTS:
            if part is CHECK:
                check(on)
            if not part.asked(asked):
                continue
            refusal = part.refusal(asked, on)
            if refusal is None:
                value = opened.enter_context(part.open(asked, on))
                setattr(on, part.name, True if value is None else value)
            else:
                on.reasons.append(refusal)
        yield on
