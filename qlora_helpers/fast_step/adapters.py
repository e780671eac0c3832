"""Adapters kept in 32 bits that compute in the model's 16.

peft casts the input of every float32 adapter up, or autocast casts it back: copies of the activations either way. An adapter's
weights are thousands of times smaller than what flows through it: cast those instead, and let the optimizer keep its 32 bits. The
second adapter matrix adds to the layer's output inside its product, which saves two passes over that output.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from qlora_helpers.fast_step.patching import replace_forward


@contextmanager
def weights_cast_in_place_of_activations(model: torch.nn.Module) -> Iterator[int]:
    """While open, LoRA layers with one plain adapter compute as above; yields how many do.

    Layers with DoRA, an adapter bias or several adapters keep peft's way.

    Args:
        model: a peft model.
    """
    from peft.tuners.lora import LoraLayer

    changed = 0
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, LoraLayer) and is_plain(module):
                replace_forward(module, types.MethodType(_lora_forward(module.forward), module), undo)
                changed += 1
        yield changed


def is_plain(layer: Any) -> bool:
    """Whether a LoRA layer has one adapter without DoRA, bias or merging: two matrices beside a linear layer."""
    names = list(layer.active_adapters)
    if len(names) != 1 or names[0] not in layer.lora_A or layer.merged:
        return False
    (name,) = names
    linear = isinstance(layer.lora_A[name], torch.nn.Linear) and isinstance(layer.get_base_layer(), torch.nn.Linear)
    return linear and name not in getattr(layer, "lora_variant", {}) and not layer.lora_bias.get(name, False)


def _lora_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        if self.disable_adapters or args or kwargs:
            return original(x, *args, **kwargs)
        (name,) = self.active_adapters
        out = self.base_layer(x)
        down = self.lora_A[name].weight.to(x.dtype)
        up = self.lora_B[name].weight.to(x.dtype)
        low = F.linear(self.lora_dropout[name](x), down)
        both = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=self.scaling[name])
        return both.view_as(out)

    return forward
