"""Matrix multiplications whose unused outputs a layer with activation checkpointing skips while it recomputes.

The backward pass needs recomputed values only where it reads them. Nothing in a layer reads the output of a linear layer that is
added to the residual at its end: in a Llama the MLP's last one, in a Falcon also the attention's last one, since both are added
together. The backward pass reads only that layer's frozen weights and its adapter's input. So during recomputation such a layer
returns uninitialized memory: this skips a quarter of a Llama layer's matrix multiplications, and half of a Falcon layer's.
(`torch.utils.checkpoint` stops early, but only after that multiplication, and a compiled layer does not stop.)
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from qlora_helpers.model.patching import replace_forward
from qlora_helpers.model.shapes.families import added_to_residual
from qlora_helpers.model.sharded_linear import ShardedLinear4bit
from qlora_helpers.model.wiring import is_plain_lora

_SIGNATURES = {
    "linear_unless_recomputing": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "linear_4bit_unless_recomputing": "(Tensor x, Tensor packed, int[] shape, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? bias, Tensor? absmax_8bit, Tensor? absmax_code, Tensor? absmax_offset) -> Tensor",
}
for _name, _signature in _SIGNATURES.items():
    torch.library.define(f"qlora_helpers::{_name}", _signature)


class _Recomputing(threading.local):
    """Entered by the thread that recomputes, which is autograd's; it can be entered again."""

    on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *exception: object) -> None:
        self.on = False


_recomputing = _Recomputing()


def recomputation_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns the contexts of the forward pass and of its recomputation, for `torch.utils.checkpoint`'s `context_fn`."""
    return nullcontext(), _recomputing


def recomputing() -> bool:
    """Whether this thread is recomputing a layer."""
    return _recomputing.on


def _uninitialized(x: torch.Tensor, width: int) -> torch.Tensor:
    """Returns `(..., width)` of uninitialized memory."""
    return x.new_empty((*x.shape[:-1], width))


@torch.library.impl("qlora_helpers::linear_unless_recomputing", "CompositeExplicitAutograd")
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _uninitialized(x, weight.shape[0]) if _recomputing.on else F.linear(x, weight, bias)


@torch.library.impl("qlora_helpers::linear_4bit_unless_recomputing", "CompositeExplicitAutograd")
def _linear_4bit(x: torch.Tensor, packed: torch.Tensor, shape: list[int], *rest: Any) -> torch.Tensor:
    return (
        _uninitialized(x, shape[0])
        if _recomputing.on
        else torch.ops.bitsandbytes.gemm_4bit.default(x, packed, shape, *rest)
    )


@torch.library.register_fake("qlora_helpers::linear_unless_recomputing")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("qlora_helpers::linear_4bit_unless_recomputing")
def _(x: torch.Tensor, packed: torch.Tensor, shape: list[int], *rest: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


class _SkippableMatmul(torch.autograd.Function):
    """A frozen linear layer whose output is skipped while its decoder layer recomputes.

    Its gradient needs only the weights, so it saves nothing that a checkpoint would have to restore.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: Any) -> torch.Tensor:
        ctx.weight, ctx.state = weight, state
        if state is None:
            return torch.ops.qlora_helpers.linear_unless_recomputing(x, weight, bias)
        nested = state.state2 if state.nested else None
        return torch.ops.qlora_helpers.linear_4bit_unless_recomputing(
            x,
            weight.view(-1, 1),
            state.shape,
            nested.absmax if nested else state.absmax,
            state.blocksize,
            state.quant_type,
            bias,
            state.absmax if nested else None,
            nested.code if nested else None,
            state.offset if nested else None,
        )

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = ctx.weight
        if ctx.state is not None:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.view(-1, 1), ctx.state).to(gradient.dtype)
        return gradient @ weight, None, None, None


@contextmanager
def unused_outputs_skipped(model: torch.nn.Module, layers: list[torch.nn.Module]) -> Iterator[int]:
    """While open, layers skip those outputs when they recompute; yields how many each layer skips.

    This applies to frozen linear layers, in 4 bits or at full width. Others, such as those whose adapter reads the output (DoRA),
    and families whose wiring is not known, compute as before.

    Args:
        model: a transformers model, without peft's wrapper around it.
        layers: all of its decoder layers, which share their compiled kernels.
    """
    text, changed = model.config.get_text_config(), 0
    # float16 trains under autocast, which casts what a linear layer gets.
    names = () if model.dtype == torch.float16 else added_to_residual(text.to_dict())
    with ExitStack() as undo:
        for path, module in ((path, module) for layer in layers for path, module in layer.named_modules()):
            if path.rpartition(".")[2] not in names:
                continue
            adapted = hasattr(module, "get_base_layer")
            linear = module.get_base_layer() if adapted else module
            if _can_be_skipped(linear) and (not adapted or is_plain_lora(module)):
                if (fp8 := getattr(linear, "fp8", None)) is not None:
                    fp8.skips = True
                    undo.callback(setattr, fp8, "skips", False)
                if isinstance(linear, ShardedLinear4bit):
                    undo.callback(setattr, linear, "multiply", None)
                    linear.multiply = torch.ops.qlora_helpers.linear_4bit_unless_recomputing.default
                elif fp8 is None or fp8.among.refusal is not None:
                    replace_forward(linear, types.MethodType(_skippable_forward(linear.forward), linear), undo)
                changed += 1
        yield changed // max(1, len(layers))


def _can_be_skipped(linear: Any) -> bool:
    if any(weight.requires_grad for weight in linear.parameters()):
        return False
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return type(linear) is torch.nn.Linear or type(linear).__name__ == "FalconLinear"
    rows, columns = state.shape
    return (rows, columns) == (linear.out_features, linear.in_features) and (
        not state.nested or state.state2.blocksize == 256
    )


def _skippable_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        state = getattr(self.weight, "quant_state", None)
        dtype = self.weight.dtype if state is None else getattr(self, "compute_dtype", None) or x.dtype
        lost = state is None and hasattr(self, "quant_state")  # bitsandbytes restores it
        other = x.dtype != dtype or (self.bias is not None and self.bias.dtype != dtype)
        if lost or other or not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return own(x)
        return _SkippableMatmul.apply(x, self.weight, self.bias, state)

    return forward
