"""Replaces parts of a model for a while: a module's `forward`, or the attention that its layers ask for by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def replace_forward(module: torch.nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Replaces a module's forward pass until `undo` is closed.

    accelerate's hooks set `forward` on the module itself; `undo` then restores that one, otherwise the class's.

    Args:
        module: keeps its class, its hooks and the names of its weights.
        forward: takes the same arguments as the module's own.
        undo: restores it.
    """
    if "forward" in vars(module):
        undo.callback(setattr, module, "forward", module.forward)
    else:
        undo.callback(delattr, module, "forward")
    module.forward = forward


@contextmanager
def attention_replaced(model: torch.nn.Module, name: str, attention: Callable[..., Any]) -> Iterator[None]:
    """While open, layers that use transformers' sdpa attention use this one instead. It works for every model but Falcon.

    Args:
        model: a transformers model.
        name: its name in the registry.
        attention: as transformers calls it, with queries, keys and values of `(batch, heads, tokens, head_dim)`.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    changed = [config for config in configs.values() if getattr(config, "_attn_implementation", None) == "sdpa"]
    for config in changed:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = "sdpa"
