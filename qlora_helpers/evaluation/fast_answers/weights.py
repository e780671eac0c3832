"""The frozen layers' weights in bfloat16 (or float32) while a model answers, so that no token unpacks them again.

A 4-bit layer unpacks its weight for every matrix multiplication of several rows. Unpacked once, the same numbers are multiplied.
Adapters stay apart, in the model's type: merged into the copies they would be faster, but rounded once more.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from qlora_helpers.model.nf4 import is_nf4, unpacked_numel
from qlora_helpers.model.patching import replace_forward
from qlora_helpers.model.sharded_linear import ShardedLinear4bit
from qlora_helpers.model.wiring import is_plain_lora


def dense_bytes(model: torch.nn.Module) -> int:
    """Bytes that unpacked copies of all 4-bit layers take; 0 where there are none."""
    return sum(unpacked_numel(m.weight) * _type(m).itemsize for m in model.modules() if is_packed(m))


def is_packed(module: torch.nn.Module) -> bool:
    """Whether a module is a 4-bit linear layer whose weight is whole here."""
    return is_nf4(module) and not isinstance(module, ShardedLinear4bit)


def unpacked(layer: Any) -> torch.Tensor:
    """Unpacks a 4-bit layer's weight as its matrix multiplications use it, `(out_features, in_features)`."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(_type(layer))


def _type(layer: Any) -> torch.dtype:
    return layer.compute_dtype or layer.weight.quant_state.dtype


@contextmanager
def dense_weights(model: torch.nn.Module) -> Iterator[int]:
    """While open, 4-bit layers multiply by unpacked copies of their weights; yields how many do.

    The copies are for eval mode only: there is no reason to train with them.

    Args:
        model: with or without adapters.
    """
    changed = 0
    with ExitStack() as undo:
        for module in model.modules():
            if is_packed(module):
                replace_forward(module, _dense_forward(unpacked(module), module.bias), undo)
                changed += 1
        yield changed


def _dense_forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    bias = None if bias is None else bias.to(weight.dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    return forward


@contextmanager
def adapters_in_model_type(model: torch.nn.Module) -> Iterator[int]:
    """While open, plain LoRA layers multiply by copies of A and B in the model's type; yields how many do.

    peft casts the activations to the adapters' float32 and back at every layer and token. `disable_adapter` and `set_adapter` still
    work; a layer of which one adapter is not plain keeps its own way.

    Args:
        model: with or without adapters.
    """
    from peft.tuners.lora import LoraLayer

    dtype, changed = model.get_input_embeddings().weight.dtype, 0
    with ExitStack() as undo:
        for module in model.modules():
            plain = isinstance(module, LoraLayer) and len(module.lora_A) > 0
            if plain and all(is_plain_lora(module, name) for name in module.lora_A):
                replace_forward(module, types.MethodType(_lora_forward(module, dtype), module), undo)
                changed += 1
        yield changed


def _lora_forward(layer: Any, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    copies = {
        name: (layer.lora_A[name].weight.detach().to(dtype), layer.lora_B[name].weight.detach().to(dtype).t())
        for name in layer.lora_A
    }

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`, with the adapter that is active now."""
        out = self.base_layer(x)
        if self.disable_adapters:
            return out
        (name,) = self.active_adapters
        if name not in copies:  # another run's adapter, which has none at this layer
            return out
        down, up = copies[name]
        low = F.linear(x, down)
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up, alpha=self.scaling[name]).view_as(out)

    return forward
