"""LoRA adapters on the experts of a mixture, under peft's names and in its files (`LoraConfig.target_parameters`).

peft adds `B A` of every expert to a stack by a parametrisation of the parameter, which a packed stack does not allow. Here its
layer (`peft.tuners.lora.layer.ParamWrapper`) keeps the matrices, and the sum is made where the stack is dequantised
(`expert_stacks.changed`): it exists for one layer at a time, and the backward pass makes it again. An expert's `A` is `(r, in)`,
in rows `r * expert` and following of the layer's; its `B` is each `experts`-th column.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.expert_stacks import PackedStacks, Product, changed, open_stacks, shown_by_shape, stand_in


class StackAdapter(ParamWrapper):
    """An adapter on one stack: peft's parameters, names and files, and the sum made while the experts run."""

    def get_param(self) -> torch.Tensor:
        """Returns a tensor of the stack's shape, type and device, which takes no memory; peft reads nothing else of it."""
        return stand_in(self.get_base_layer(), self.parameter_name)

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._check_forward_args(args[0] if args else None, *args[1:], **kwargs)
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        with changed(self.get_base_layer(), self.parameter_name, self._products):
            return self.base_layer(*args, **kwargs)

    def _products(self) -> tuple[Product, ...]:
        return tuple(Product(*self.get_delta_factors(name)) for name in self.active_adapters if name in self.lora_A)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Adds the adapter to a stack in 16 or 32 bits.

        Raises:
            ModelError: the stack is in 4 bits, which would round the adapter away.
        """
        if getattr(self.get_base_layer()._parameters[self.parameter_name], "quant_state", None) is not None:
            raise ModelError(
                "an adapter can't be merged into experts in 4 bits",
                next_step="Export the run: the adapter is merged into a copy of the model in bfloat16.",
            )
        super().merge(*args, **kwargs)


StackAdapter.__name__ = ParamWrapper.__name__  # by which peft knows its wrappers where a further adapter is added


@contextlib.contextmanager
def stacks_adapted(model: torch.nn.Module) -> Iterator[None]:
    """While open, peft may add adapters to a model's stacks; afterwards those that it added compute as described above."""
    with shown_by_shape():
        yield
    for module in model.modules():
        if type(module) is ParamWrapper:
            module.__class__ = StackAdapter


def open_all(model: torch.nn.Module, paths: tuple[str, ...]) -> None:
    """Prepares the modules that hold these stacks for `StackAdapter`, also where they are in 16 or 32 bits."""
    names: dict[str, list[str]] = {}
    for path in paths:
        holder, _, name = path.rpartition(".")
        names.setdefault(holder, []).append(name)
    for holder, own in names.items():
        module: Any = model.get_submodule(holder)
        if not isinstance(module, PackedStacks):
            open_stacks(module, own, module._parameters[own[0]].dtype)


def weights_on_experts(model: torch.nn.Module) -> int:
    """Counts the weights of a model's adapters on stacks that are trained."""
    return sum(
        weight.numel()
        for module in model.modules()
        if isinstance(module, StackAdapter)
        for part in (module.lora_A, module.lora_B)
        for weight in part.parameters()
        if weight.requires_grad
    )
