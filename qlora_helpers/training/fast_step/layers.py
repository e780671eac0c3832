"""Decoder layers, one at a time: each compiled, and any number of them recomputed in the backward pass.

All layers have one shape, so the first is compiled and the others use its kernels (regional compilation, PyTorch's recipe of that
name). A compiled layer keeps no value that a pointwise kernel can make again from others that are kept: norms, an MLP's
non-linearity and products cost a pass over memory and no matrix product, and are a third of what a layer keeps. A layer that is
recomputed keeps its input alone (Chen et al. 2016, arXiv:1604.06174); with a number between none and all, memory is spent where
there is some.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
from torch.utils.checkpoint import checkpoint

from qlora_helpers.model.patching import replace_forward
from qlora_helpers.model.wiring import decoder_layers
from qlora_helpers.planning.memory import layers_to_checkpoint
from qlora_helpers.training.fast_step.matmuls import recomputation_contexts, unused_outputs_skipped

POINTWISE_VALUES_MADE_AGAIN = dict.fromkeys(
    ("ban_recompute_used_far_apart", "ban_recompute_long_fusible_chains", "ban_recompute_materialized_backward"), False
)
"""For `torch._functorch.config`. Its partitioner is wary of making values again where the backward pass is far away or needs them
written out; without these bans it keeps as few bytes as it can. Matmuls and reductions stay banned."""


@contextmanager
def layers_changed(
    model: torch.nn.Module, *, compiled: bool, checkpointed: int, keep_random_state: bool
) -> Iterator[int]:
    """While open, decoder layers are compiled, and `checkpointed` of them recompute their activations.

    Yields how many products a layer leaves out while it recomputes.

    Args:
        model: a transformers model, without peft's wrapper around it.
        compiled: whether to compile every layer; blocks must have one shape.
        checkpointed: how many layers keep their input alone, 0 to all.
        keep_random_state: whether the recomputation must draw the same dropout masks.
    """
    layers = decoder_layers(model)
    chosen = set(layers_to_checkpoint(len(layers), min(checkpointed, len(layers))))
    skipped = 0
    with ExitStack() as undo:
        if compiled:
            undo.enter_context(torch._functorch.config.patch(POINTWISE_VALUES_MADE_AGAIN))
            # Under DDP each layer would be cut into parts, for gradients to leave sooner; theirs are small, and cuts keep values.
            undo.enter_context(torch._dynamo.config.patch(optimize_ddp=False))
        if chosen:
            skipped = undo.enter_context(unused_outputs_skipped(model, layers))
            text = model.config.get_text_config()
            undo.callback(setattr, text, "use_cache", text.use_cache)
            text.use_cache = False  # a layer that recomputes would add its keys to a cache twice
        for index, layer in enumerate(layers):
            forward = layer._old_forward if _is_hooked(layer) else layer.forward
            if compiled:
                forward = torch.compile(forward, dynamic=False)
            if index in chosen:
                forward = _recomputing(layer, forward, keep_random_state)
            if compiled or index in chosen:
                replace_forward(layer, _after_hook(layer, forward), undo)
        yield skipped


@contextmanager
def inner_hooks_set_aside(layers: list[torch.nn.Module]) -> Iterator[int]:
    """While open, accelerate's hooks on the parts of decoder layers do nothing; yields how many there are.

    Where layers are on several GPUs, accelerate hooks every module, to bring what enters it to its GPU. The layer's own hook has
    done so for all of its parts; theirs take time, and would cut what is compiled into as many pieces, each of which keeps what
    goes in and out.

    Args:
        layers: of which nothing else is replaced yet.
    """
    with ExitStack() as undo:
        parts = [part for layer in layers for part in layer.modules() if part is not layer and _is_hooked(part)]
        for part in parts:
            replace_forward(part, part._old_forward, undo)
        yield len(parts)


def _after_hook(layer: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that begins and ends with what accelerate's hook of the layer does, where it has one."""
    if not _is_hooked(layer):
        return forward

    @functools.wraps(forward)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = layer._hf_hook.pre_forward(layer, *args, **kwargs)
        return layer._hf_hook.post_forward(layer, forward(*args, **kwargs))

    return hooked


def _is_hooked(module: torch.nn.Module) -> bool:
    """Whether accelerate brings inputs to a module's device, and no weights."""
    return hasattr(module, "_old_forward") and not getattr(getattr(module, "_hf_hook", None), "offload", True)


def _recomputing(layer: torch.nn.Module, forward: Callable[..., Any], keep_random_state: bool) -> Callable[..., Any]:
    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=keep_random_state,
            context_fn=recomputation_contexts,
            **kwargs,
        )

    return checkpointed


def compile_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why layers can't be compiled here, or None where they can: a small product is compiled and differentiated."""
    if device.type != "cuda":
        return "layers are compiled on CUDA GPUs alone"
    try:
        x = torch.ones(16, 16, device=device, dtype=dtype, requires_grad=True)
        torch.compile(lambda value: torch.nn.functional.gelu(value) * 2, dynamic=False)(x).sum().backward()
    except Exception as error:  # triton or the C compiler is missing, in as many ways as there are machines
        return f"torch.compile does not work here: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return None
