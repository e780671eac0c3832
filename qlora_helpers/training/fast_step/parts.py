"""The fast training step: what makes a step of the plain path faster without changing what is learned.

Each part is a context manager that changes a model while it is open and leaves it as it was; `fast_step` opens those that can run
on the hardware and says why another can't. Pure torch below the model; knows nothing of data sources, runs or settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from qlora_helpers.model.host_embedding import brought_back, embeddings_on_host, offload_refusal
from qlora_helpers.model.shapes.families import has_dropout
from qlora_helpers.model.wiring import base_model_of, decoder_layers
from qlora_helpers.training.fast_step.adapters import weights_cast_in_place_of_activations
from qlora_helpers.training.fast_step.block_diagonal import block_diagonal_attention, kernel_refusal
from qlora_helpers.training.fast_step.graphs import CapturedPasses, graph_refusal, passes_captured
from qlora_helpers.training.fast_step.layers import compile_refusal, inner_hooks_set_aside, layers_changed
from qlora_helpers.training.fast_step.loss import ChunkedLoss, loss_in_chunks

__all__ = ["FastStep", "fast_step"]


@dataclass
class FastStep:
    """What of the fast step is on.

    Attributes:
        block_diagonal: whether batches carry the starts of their rows in place of a mask.
        loss: the loss in chunks, or None where the model's own is used.
        adapters: how many adapted layers cast weights in place of activations.
        compiled: whether the decoder layers are compiled.
        graphs: the passes recorded as CUDA graphs, or None where none may be.
        offloaded: whether the input embedding lies in the host's memory.
        checkpointed, layers: how many decoder layers recompute their activations, of how many.
        skipped: how many products of such a layer are made once.
        reasons: why a part is off, as it was known when the step was opened.
    """

    block_diagonal: bool = False
    loss: ChunkedLoss | None = None
    adapters: int = 0
    compiled: bool = False
    graphs: CapturedPasses | None = None
    offloaded: bool = False
    checkpointed: int = 0
    layers: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def recording(self) -> bool:
        """Whether passes are recorded as far as is known: what can't be recorded shows when it is tried."""
        return self.graphs is not None and self.graphs.refusal is None

    @property
    def why_off(self) -> list[str]:
        """Why a part is off, what came to light while training included."""
        return [*self.reasons, *([self.graphs.refusal] if self.graphs and self.graphs.refusal else [])]

    def __repr__(self) -> str:
        parts = [
            ("rows attended apart without a mask", self.block_diagonal),
            ("loss in chunks", self.loss is not None),
            (f"{self.adapters} adapters in 32 bits computing in the model's type", self.adapters > 0),
            ("layers compiled", self.compiled),
            ("passes recorded as CUDA graphs", self.recording),
        ]
        parts += [("input embedding in the host's memory", True)] if self.offloaded else []
        lines = [f"{'on ' if on else 'off'}  {name}" for name, on in parts]
        once = f", {self.skipped} of the products of each made once" if self.skipped else ""
        lines.append(f"     {self.checkpointed} of {self.layers} layers recomputed{once}")
        return "\n".join(lines + [f"     ({reason})" for reason in self.why_off])


@contextmanager
def fast_step(
    model: torch.nn.Module,
    *,
    packed: bool,
    longest: int,
    compiled: bool,
    checkpointed: int | None,
    captured: bool = False,
    accumulation: int = 1,
    offload_embeddings: bool = False,
    check: Callable[[FastStep], None] = lambda on: None,
) -> Iterator[FastStep]:
    """Opens all parts that can run, around one session of training.

    Args:
        model: a peft model.
        packed: whether blocks hold several rows, all blocks having one length.
        longest: an upper bound on a row's tokens.
        compiled: whether the run is long enough for compilation to pay.
        checkpointed: how many decoder layers recompute their activations; None for all.
        captured: whether passes are recorded as CUDA graphs where they can be.
        accumulation: forward passes per optimizer step.
        offload_embeddings: whether the input embedding goes into the host's memory.
        check: called before anything is compiled; may raise.
    """
    inner = base_model_of(model)
    device, dtype = inner.get_input_embeddings().weight.device, inner.dtype
    brought_back(inner.get_input_embeddings())
    on = FastStep(layers=len(decoder_layers(inner)))
    on.checkpointed = on.layers if checkpointed is None else min(checkpointed, on.layers)
    looked_up = None
    with ExitStack() as parts:
        parts.enter_context(inner_hooks_set_aside(decoder_layers(inner)))
        if offload_embeddings:
            refusal = offload_refusal(inner)
            if refusal is None:
                looked_up = parts.enter_context(embeddings_on_host(inner))
                on.offloaded = True
            else:
                on.reasons.append(refusal)
        on.adapters = parts.enter_context(weights_cast_in_place_of_activations(model))
        if packed:
            refusal = kernel_refusal(device, dtype, _head_dim(inner)) or _attention_refusal(inner)
            if refusal is None:
                parts.enter_context(block_diagonal_attention(inner, longest=longest))
                on.block_diagonal = True
            else:
                on.reasons.append(refusal)
        refusal = _head_refusal(inner)
        if refusal is None:
            on.loss = parts.enter_context(loss_in_chunks(inner))
        else:
            on.reasons.append(refusal)
        check(on)
        if compiled:
            refusal = compile_refusal(device, dtype) if packed else "padded rows differ in length: nothing is compiled"
            on.compiled = refusal is None
            on.reasons += [refusal] if refusal else []
        dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
        dropout = dropout or has_dropout(inner.config.get_text_config().to_dict())  # by functions, not modules
        on.skipped = parts.enter_context(
            layers_changed(inner, compiled=on.compiled, checkpointed=on.checkpointed, keep_random_state=dropout)
        )
        if captured:
            refusal = graph_refusal(model, packed=packed, dropout=dropout, listed=on.loss is not None)
            if refusal is None:
                on.graphs = parts.enter_context(
                    passes_captured(model, passes_before=accumulation + 1, prepare=looked_up)
                )
            else:
                on.reasons.append(refusal)
        yield on


def _head_dim(model: torch.nn.Module) -> int:
    text = model.config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _attention_refusal(model: torch.nn.Module) -> str | None:
    text = model.config.get_text_config()
    if text._attn_implementation != "sdpa":
        return f"attention is {text._attn_implementation}: only sdpa's is replaced"
    if getattr(text, "attn_logit_softcapping", None):
        return "the model bounds its attention scores (soft-capping), which the kernel does not"
    if getattr(text, "attention_dropout", 0.0):
        return "the model drops attention scores while it trains, which the kernel does not"
    return None


def _head_refusal(model: torch.nn.Module) -> str | None:
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(head, torch.nn.Linear) or head.weight.requires_grad:
        return "the output layer is trained or no linear layer: its logits are needed whole"
    changed = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    if any(getattr(text, name, None) for name in changed):
        return "the model changes its logits after the output layer: its own loss is used"
    return None
