"""Proves on the loaded model, before training, that its frozen weights may be multiplied in FP8.

A piece of the training data goes through the model forward and backward, in FP8 and in bfloat16: the multiplications of every
layer, the loss and the adapters' gradient must lie within stated bounds. Knows nothing of settings or runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from qlora_helpers.data.batches import AllLogits, SequenceCollator, TrainedTokens
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.model.wiring import decoder_layers
from qlora_helpers.training.fast_step.fp8 import Fp8Matmuls, fp8_backward
from qlora_helpers.training.fast_step.fp8_kernels import rows_to_fp8
from qlora_helpers.training.fast_step.layers import layers_changed
from qlora_helpers.training.probes import loss_and_gradient

TOKENS = 256  # of the piece; so few that it fits beside the weights with activation checkpointing
MATMUL_ERROR = 0.08  # of any layer; normal numbers give 0.038, a real model of 135 M parameters 0.051 at most
LOSS_ERROR = 0.05  # on one piece; the same model: 0.018
GRADIENT_ERROR = 0.5  # of all adapters together, on one piece; the same model: 0.27


@dataclass(frozen=True)
class Fp8Proof:
    """Relative errors of FP8 against bfloat16: the norm of the difference over the norm.

    Attributes:
        forward, backward: of each layer's multiplications, by its path.
        flushed: share of each layer's input values that are not 0 and become 0.
        loss, gradient: of the loss, and of all adapters' gradients as one vector.
    """

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)
    flushed: dict[str, float] = field(default_factory=dict)
    loss: float = 0.0
    gradient: float = 0.0

    @property
    def refusal(self) -> str | None:
        """What is outside its bound, in a sentence; None where nothing is. NaN is outside."""
        for name, errors in (("forward", self.forward), ("backward", self.backward)):
            path, error = _worst(errors)
            if not error <= MATMUL_ERROR:
                return f"no FP8: the {name} multiplication of {path} is {error:.1%} off, more than {MATMUL_ERROR:.0%}"
        if not self.loss <= LOSS_ERROR:
            return f"no FP8: the loss is {self.loss:.2%} off, more than {LOSS_ERROR:.0%}"
        if not self.gradient <= GRADIENT_ERROR:
            return f"no FP8: the adapters' gradient is {self.gradient:.1%} off, more than {GRADIENT_ERROR:.0%}"
        return None

    def __str__(self) -> str:
        (_, forward), (_, backward), (_, flushed) = map(_worst, (self.forward, self.backward, self.flushed))
        return (
            f"FP8 against bfloat16 on this model: multiplications {forward:.1%} off at most forward, {backward:.1%} backward, "
            f"loss {self.loss:.2%}, adapters' gradient {self.gradient:.1%}, {flushed:.1%} of a layer's values rounded to 0"
        )


def _worst(errors: dict[str, float]) -> tuple[str, float]:
    """The largest; a value that is not a number counts as larger than any."""
    return max(errors.items(), key=lambda item: (item[1] != item[1], item[1]), default=("", 0.0))


def prove_fp8(
    model: torch.nn.Module, matmuls: Fp8Matmuls, sequence: dict[str, Any], collator: SequenceCollator, *, dropout: bool
) -> Fp8Proof:
    """Compares FP8 with bfloat16 on a piece of a packed sequence.

    Args:
        model: with adapters, the parts of the fast step open that change values.
        matmuls: the layers that multiply in FP8; none may be refused yet.
        sequence: of the training data.
        collator: as the trainer's.
        dropout: whether the model draws random numbers; both ways draw the same.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = model.get_input_embeddings().weight.device
    listed = isinstance(collator.targets, TrainedTokens)
    probe = collator.for_probe(targets=TrainedTokens() if listed else AllLogits())
    batch = {name: value.to(device) for name, value in probe([_piece(sequence)]).items()}
    layers = len(decoder_layers(inner))
    was_training = model.training
    model.train()
    with layers_changed(inner, compiled=False, checkpointed=layers, keep_random_state=dropout):
        with _watched(matmuls) as errors:
            loss, gradient = _drawn_alike(model, batch)
        try:
            matmuls.refusal = "compared with bfloat16"
            exact_loss, exact = _drawn_alike(model, batch)
        finally:
            matmuls.refusal = None
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    forward, backward, flushed = ({path: float(error) for path, error in found.items()} for found in errors)
    apart = float((gradient - exact).norm() / exact.norm())
    return Fp8Proof(forward, backward, flushed, loss=abs(loss - exact_loss) / abs(exact_loss), gradient=apart)


def _drawn_alike(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return loss_and_gradient(model, batch)


def _piece(sequence: dict[str, Any]) -> dict[str, Any]:
    """The last tokens up to the last that is trained."""
    trained = [index for index, label in enumerate(sequence["labels"]) if label != IGNORED]
    end = trained[-1] + 1 if trained else len(sequence["labels"])
    return {name: list(sequence[name][max(0, end - TOKENS) : end]) for name in ("input_ids", "labels", "segment_ids")}


@contextmanager
def _watched(matmuls: Fp8Matmuls) -> Iterator[tuple[dict[str, torch.Tensor], ...]]:
    """While open, every layer's multiplications are compared with bfloat16; yields errors both ways, and what is flushed."""
    from bitsandbytes.functional import dequantize_4bit

    found: tuple[dict[str, torch.Tensor], ...] = ({}, {}, {})
    forward, backward, flushed = found

    def watch(path: str, linear: Any) -> Any:
        def values(dtype: torch.dtype) -> torch.Tensor:
            return dequantize_4bit(linear.weight.data.view(-1, 1), linear.weight.quant_state).to(dtype)

        def hook(module: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            if path in forward:  # made again by activation checkpointing
                return
            with torch.no_grad():
                forward[path] = _error(out, F.linear(args[0], values(out.dtype), linear.bias))
                rounded, _ = rows_to_fp8(args[0].flatten(0, -2))
                flushed[path] = ((rounded.float() == 0) & (args[0].flatten(0, -2) != 0)).float().mean()
            if out.requires_grad:
                out.register_hook(look_back)

        @torch.no_grad()
        def look_back(gradient: torch.Tensor) -> None:
            backward[path] = _error(fp8_backward(gradient, linear.fp8), gradient @ values(gradient.dtype))

        return hook

    with ExitStack() as undo:
        for path, linear in matmuls.linears.items():
            undo.callback(linear.register_forward_hook(watch(path, linear)).remove)
        yield found


def _error(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Stays on the device; 0 where both are 0, NaN where either is not finite."""
    apart = (found.float() - exact.float()).norm()
    return torch.where(apart == 0, apart, apart / exact.float().norm())
