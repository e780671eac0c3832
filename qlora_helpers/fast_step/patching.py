"""A module's `forward` replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch


def replace_forward(module: torch.nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Replaces a module's forward pass until `undo` is closed.

    accelerate's hooks set one on the module itself too; that one comes back, where otherwise the class's does.

    Args:
        module: keeps its class, its hooks and the names of its weights.
        forward: takes what the module's own took.
        undo: restores it.
    """
    if "forward" in vars(module):
        undo.callback(setattr, module, "forward", module.forward)
    else:
        undo.callback(delattr, module, "forward")
    module.forward = forward
