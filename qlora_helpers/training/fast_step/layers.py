"""Compiles decoder layers one at a time, and gives any number of them activation checkpointing.

All layers have one shape, so the first is compiled and the others reuse its kernels (PyTorch's recipe "regional compilation"). A
compiled layer keeps no value that a pointwise kernel can recompute from others that are kept: norms, an MLP's non-linearity and
element-wise products cost a pass over memory and no matrix multiplication, and are a third of what a layer keeps. A layer with
activation checkpointing keeps only its input (Chen et al. 2016, arXiv:1604.06174). With a number between none and all, the memory
that is free is put to use.
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
from qlora_helpers.training.fast_step.host_inputs import HostInputs
from qlora_helpers.training.fast_step.matmuls import recomputation_contexts, unused_outputs_skipped

MOST_KINDS = (
    64  # of shapes that a function is compiled for; PyTorch's own limit of 8 is less than a few kinds of layers need
)
RECOMPUTE_POINTWISE = dict.fromkeys(
    ("ban_recompute_used_far_apart", "ban_recompute_long_fusible_chains", "ban_recompute_materialized_backward"), False
)
"""Settings of `torch._functorch.config`. Its partitioner avoids recomputing values where the backward pass is far away or needs
them written out; without these bans it keeps as few bytes as it can. Matrix multiplications and reductions stay banned."""


@contextmanager
def layers_changed(
    model: torch.nn.Module, *, compiled: bool, checkpointed: int, keep_random_state: bool, on_host: bool = False
) -> Iterator[int]:
    """While open, decoder layers are compiled, and `checkpointed` of them have activation checkpointing.

    Yields how many unused outputs such a layer skips while it recomputes.

    Args:
        model: a transformers model, without peft's wrapper around it.
        compiled: whether to compile every layer; batches must have one shape.
        checkpointed: how many layers keep only their input, 0 to all.
        keep_random_state: whether the recomputation must draw the same dropout masks.
        on_host: whether the inputs of checkpointed layers wait in the host's memory.
    """
    layers = decoder_layers(model)
    chosen = set(layers_to_checkpoint(len(layers), min(checkpointed, len(layers))))
    skipped = 0
    inputs = HostInputs() if on_host else None
    with ExitStack() as undo:
        if compiled:
            undo.enter_context(torch._functorch.config.patch(RECOMPUTE_POINTWISE))
            # DDP would split each layer so that gradients are sent sooner; they are small, and a split keeps more values.
            undo.enter_context(torch._dynamo.config.patch(optimize_ddp=False))
            # Layers of several kinds share one function, and each kind is compiled for training and for evaluation.
            undo.enter_context(torch._dynamo.config.patch(recompile_limit=MOST_KINDS))
        if chosen:
            skipped = undo.enter_context(unused_outputs_skipped(model, layers))
            text = model.config.get_text_config()
            undo.callback(setattr, text, "use_cache", text.use_cache)
            text.use_cache = False  # a layer that recomputes would add its keys to the cache twice
        for index, layer in enumerate(layers):
            forward = layer._old_forward if _is_hooked(layer) else layer.forward
            if compiled:
                forward = torch.compile(forward, dynamic=False)
            if index in chosen:
                place = (sorted(chosen).index(index), index == max(chosen))
                forward = _checkpointed(layer, forward, keep_random_state, inputs, *place)
            if compiled or index in chosen:
                replace_forward(layer, _after_hook(layer, forward), undo)
        yield skipped


@contextmanager
def inner_hooks_disabled(layers: list[torch.nn.Module]) -> Iterator[int]:
    """While open, accelerate's hooks on the parts of decoder layers do nothing; yields how many there are.

    Where layers are on several GPUs, accelerate hooks every module, to bring what enters it to its GPU. The layer's own hook has
    done so for all of its parts. Theirs take time, and would split a compiled layer into as many pieces, each of which keeps its
    inputs and outputs.

    Args:
        layers: decoder layers in which nothing else is replaced yet.
    """
    with ExitStack() as undo:
        parts = [part for layer in layers for part in layer.modules() if part is not layer and _is_hooked(part)]
        for part in parts:
            replace_forward(part, part._old_forward, undo)
        yield len(parts)


def _after_hook(layer: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a forward pass in what accelerate's hook of the layer does before and after it, where it has one."""
    if not _is_hooked(layer):
        return forward

    @functools.wraps(forward)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = layer._hf_hook.pre_forward(layer, *args, **kwargs)
        return layer._hf_hook.post_forward(layer, forward(*args, **kwargs))

    return hooked


def _is_hooked(module: torch.nn.Module) -> bool:
    """Whether accelerate moves a module's inputs to its device, and no weights."""
    return hasattr(module, "_old_forward") and not getattr(getattr(module, "_hf_hook", None), "offload", True)


def _checkpointed(
    layer: torch.nn.Module,
    forward: Callable[..., Any],
    keep_random_state: bool,
    inputs: HostInputs | None,
    number: int,
    last: bool,
) -> Callable[..., Any]:
    """Gives a layer activation checkpointing; `number` is its place among such layers, and `last` whether it is the last."""
    keep = functools.partial(
        checkpoint, use_reentrant=False, preserve_rng_state=keep_random_state, context_fn=recomputation_contexts
    )

    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if inputs is None or not args:
            return keep(forward, *args, **kwargs)
        hidden, *rest = args
        given = [
            inputs.keep(number, hidden, last=last),
            lambda: hidden,
        ]  # the recomputation's, and the forward pass's own

        def run(_: torch.Tensor, *others: Any, **named: Any) -> Any:
            return forward(given.pop()(), *others, **named)

        # What checkpoint is handed, it keeps: an empty tensor tells it the device.
        return keep(run, hidden.new_empty(0), *rest, **kwargs)

    return checkpointed


def compile_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Says why layers can't be compiled here, or None where they can; compiles and differentiates a small function to find out."""
    if device.type != "cuda":
        return "layers are compiled on CUDA GPUs only"
    try:
        x = torch.ones(16, 16, device=device, dtype=dtype, requires_grad=True)
        torch.compile(lambda value: torch.nn.functional.gelu(value) * 2, dynamic=False)(x).sum().backward()
    except Exception as error:  # triton or the C compiler is missing, which shows in many ways
        return f"torch.compile does not work here: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return None
