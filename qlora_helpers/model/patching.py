"""Replaces a module's forward pass for a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
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
