"""Adapters that are stored in float32 and compute in the model's type, such as bfloat16.

peft casts the input of every float32 adapter up, or autocast casts it back down; either way the activations are copied. An
adapter's weights are thousands of times smaller than its activations, so the weights are cast instead, and the optimizer keeps its
float32. The second adapter matrix adds to the layer's output in place, inside its matrix multiplication, so that output is neither
copied nor read again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from qlora_helpers.model.patching import replace_forward
from qlora_helpers.model.wiring import is_plain_lora

OUTPUT_NOT_CHANGED_IN_PLACE = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "query_key_value",
    "dense",
    "dense_h_to_4h",
)
"""Layers whose output the tested models don't change in place afterwards."""
torch.library.define("qlora_helpers::add_matmul_", "(Tensor(a!) out, Tensor low, Tensor up, float scale) -> ()")


@torch.library.impl("qlora_helpers::add_matmul_", "CompositeExplicitAutograd")
def _add_matmul(out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, scale: float) -> None:
    out.flatten(0, -2).addmm_(low.flatten(0, -2), up.t(), alpha=scale)


@torch.library.register_fake("qlora_helpers::add_matmul_")
def _(out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, scale: float) -> None:
    return None


class _AddedMatmul(torch.autograd.Function):
    """Computes `out + scale * low @ up.T` in place of `out`, for compiled layers: the compiler would copy `out` for `addmm`.

    The result must not be changed in place afterwards, as Falcon does with its MLP's output (`dense_4h_to_h`).
    """

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(low, up)
        ctx.scale = scale
        torch.ops.qlora_helpers.add_matmul_(out, low, up, scale)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, up = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        to_low = (flat @ up).view_as(low) * ctx.scale
        to_up = flat.t() @ (low.flatten(0, -2) * ctx.scale)
        return gradient, to_low, to_up, None


@contextmanager
def weights_cast_in_place_of_activations(model: torch.nn.Module) -> Iterator[int]:
    """While open, LoRA layers with one plain adapter compute as above; yields how many do.

    Layers with DoRA, an adapter bias or several adapters compute as in peft.

    Args:
        model: a peft model.
    """
    from peft.tuners.lora import LoraLayer

    changed = 0
    with ExitStack() as undo:
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer) and is_plain_lora(module):
                in_place = path.rpartition(".")[2] in OUTPUT_NOT_CHANGED_IN_PLACE
                replace_forward(module, types.MethodType(_lora_forward(module.forward, in_place), module), undo)
                changed += 1
        yield changed


def _lora_forward(original: Callable[..., Any], in_place: bool) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        if self.disable_adapters or args or kwargs:
            return original(x, *args, **kwargs)
        (name,) = self.active_adapters
        out = self.base_layer(x)
        down = self.lora_A[name].weight.to(x.dtype)
        up = self.lora_B[name].weight.to(x.dtype)
        low = F.linear(self.lora_dropout[name](x), down)
        scale = float(self.scaling[name])
        if in_place and torch.compiler.is_compiling():
            return _AddedMatmul.apply(out, low, up, scale)
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scale).view_as(out)

    return forward
