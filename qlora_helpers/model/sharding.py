"""Shares out the 4-bit weights of every decoder layer over several processes, by PyTorch's FSDP2 (`fully_shard`).

Each process keeps its part of a layer's packed bytes; the whole layer exists on a GPU only while it computes, and the next layer is
gathered meanwhile (Zhao et al. 2023, arXiv:2304.11277). What is gathered are 4-bit bytes, a quarter of what bfloat16 would need.

A layer's weight is one row of bytes in a linear layer of our own (`sharded_linear`). What is few or is needed all the time (norms,
biases, embedding, output layer, the constants of the constants) is whole in every process. Adapters are added later and are whole
too: they are a thousandth of the model, and so their checkpoints, their optimizer (also an 8-bit one) and the number of processes
that a run is resumed with do not depend on how the frozen weights were shared out.

While a model is loaded, `PartKeeper` cuts each weight as soon as it is quantised: no process ever holds more than its parts and one
whole weight. Knows nothing of checkpoints, adapters or training.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from qlora_helpers.base.errors import ModelError
from qlora_helpers.model.expert_stacks import PackedStacks
from qlora_helpers.model.sharded_linear import Part, ShardedLinear4bit
from qlora_helpers.model.wiring import decoder_layers, text_decoder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SHARED = "_qlora_shared"  # of a layer whose weight is cut when it arrives
GATHERED_LAYERS = 3  # whole at once: one that computes, and the next one in two buffers
_ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"


class PartKeeper:
    """Keeps this process's part of each quantised weight of a model's decoder layers.

    Args:
        mesh: the processes that share one model, in one dimension.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """While open, a quantised weight that is put into a linear layer of a decoder layer is cut at once.

        The layers were marked by `mark`. transformers puts weights in one after another; it is kept from reading several ahead, and
        from reserving GPU memory for the whole model first.
        """
        from torch.nn.modules.module import register_module_parameter_registration_hook
        from transformers import modeling_utils

        def cut(module: torch.nn.Module, name: str, weight: Any) -> Any:
            if name == "weight" and hasattr(module, _SHARED) and getattr(weight, "quant_state", None) is not None:
                return self.part_of(weight)
            return None

        with contextlib.ExitStack() as undo:
            undo.enter_context(_one_weight_at_a_time())
            undo.callback(setattr, modeling_utils, "caching_allocator_warmup", modeling_utils.caching_allocator_warmup)
            modeling_utils.caching_allocator_warmup = lambda *args, **kwargs: None
            undo.callback(register_module_parameter_registration_hook(cut).remove)
            yield

    def mark(self, model: Any) -> None:
        """Marks the 4-bit linear layers of a model's decoder layers, before their weights are read."""
        for layer in decoder_layers(model):
            for module in layer.modules():
                if isinstance(module, Linear4bit):
                    setattr(module, _SHARED, True)

    def part_of(self, weight: Params4bit) -> Part:
        """Cuts a weight as FSDP2 does: into parts of one size, of which the last may be shorter or empty."""
        state = weight.quant_state
        constants = state.absmax.reshape(-1).contiguous()
        packed = weight.data.reshape(-1)
        if packed.dtype != torch.uint8 or packed.numel() % constants.element_size():
            raise ModelError(
                "the model's 4-bit weights can't be shared out",
                expected="packed values in bytes, as many as its constants can follow",
                got=f"{packed.numel()} values in {packed.dtype}",
                next_step="Set train.share=copies, or spread in one process.",
            )
        row = torch.cat([packed, constants.view(torch.uint8)])
        size = -(-row.numel() // self.mesh.size())
        first = self.mesh.get_local_rank() * size
        part = Part(row[first : first + size].clone(), requires_grad=False)
        part.packed_bytes, part.total_bytes = packed.numel(), row.numel()
        part.state = copy.copy(state)
        part.state.absmax = constants[:0].clone()
        return part


@contextlib.contextmanager
def _one_weight_at_a_time() -> Iterator[None]:
    before = os.environ.get(_ASYNC)
    os.environ[_ASYNC] = "1"
    try:
        yield
    finally:
        os.environ.pop(_ASYNC) if before is None else os.environ.update({_ASYNC: before})


def share_layers(model: Any, mesh: DeviceMesh) -> None:
    """Shares out the decoder layers of a loaded model: FSDP2 gathers each before it computes, and the next one meanwhile.

    Args:
        model: a transformers model whose 4-bit weights are whole or `PartKeeper`'s parts; it has no adapters yet.
        mesh: the processes that share the model, in one dimension.

    Raises:
        ModelError: the model holds experts in stacks, or nothing that can be shared out.
    """
    from torch.distributed.fsdp import fully_shard

    layers, keeper = decoder_layers(model), PartKeeper(mesh)
    if any(isinstance(module, PackedStacks) for layer in layers for module in layer.modules()):
        raise stacks_not_shared()
    for layer in layers:
        parts = _take_parts(layer, keeper)
        shared = {linear.row for linear in parts}
        fully_shard(layer, mesh=mesh, ignored_params={each for each in layer.parameters() if each not in shared})
        for linear, part in parts.items():
            linear.row = _shared_row(part, mesh)
    decoder = text_decoder(model)
    shared = {each.row for each in sharded_linears(model)}
    if not shared:
        raise ModelError(
            "the model has no 4-bit weights in its decoder layers that could be shared out",
            next_step="Set model.quantization=nf4, or train.share=copies.",
        )
    fully_shard(decoder, mesh=mesh, ignored_params={each for each in decoder.parameters() if each not in shared})
    for first, second in zip(layers, layers[1:], strict=False):
        first.set_modules_to_forward_prefetch([second])
        second.set_modules_to_backward_prefetch([first])


def _take_parts(layer: torch.nn.Module, keeper: PartKeeper) -> dict[ShardedLinear4bit, Part]:
    """Replaces a layer's 4-bit linear layers; returns the new ones, whose weights are on no device yet, with their parts."""
    found: dict[ShardedLinear4bit, Part] = {}
    for parent in list(layer.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, Linear4bit):
                weight = linear.weight
                part = weight if isinstance(weight, Part) else keeper.part_of(weight)
                sharded = ShardedLinear4bit(linear, part)
                setattr(parent, name, sharded)
                found[sharded] = part
    return found


def _shared_row(part: Part, mesh: DeviceMesh) -> torch.nn.Parameter:
    from torch.distributed.tensor import DTensor, Shard

    size = torch.Size([part.total_bytes])
    row = DTensor.from_local(part.data, mesh, [Shard(0)], run_check=False, shape=size, stride=(1,))
    shared = torch.nn.Parameter(row, requires_grad=False)
    shared.quant_state = part.state  # where the audit and the counts of weights look
    return shared


def stacks_not_shared() -> ModelError:
    """Returns the error for a mixture whose experts lie in stacks."""
    return ModelError(
        "a mixture of experts can't be shared out over several processes yet",
        next_step="Set train.share=copies where the model fits one GPU, or spread it over the GPUs in one process "
        "(train.share=spread).",
    )


def sharded_linears(model: torch.nn.Module) -> list[ShardedLinear4bit]:
    """Returns a model's linear layers whose bytes are shared out; none where the model is whole in this process."""
    return [module for module in model.modules() if isinstance(module, ShardedLinear4bit)]


def bytes_elsewhere(model: torch.nn.Module) -> int:
    """Returns how many bytes of a model's weights this process saves at any time, because others hold them.

    While a layer computes it is here as a whole, and so is the next one, which is received in one buffer and copied into another.
    """
    layers = [sum(each.row.numel() for each in sharded_linears(layer)) for layer in decoder_layers(model)]
    held = sum(each.row.to_local().numel() for each in sharded_linears(model))
    return max(0, sum(layers) - held - GATHERED_LAYERS * max(layers, default=0))


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a model's layers are shared out over several processes, which must then all call it together."""
    return any(isinstance(module, ShardedLinear4bit) for module in model.modules())


def as_in_first(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what the first process has, in all processes that call a shared model together.

    Tokens that are chosen from logits go through this: kernels may round differently on two GPUs, and processes whose answers
    differ in length would wait for each other.
    """
    torch.distributed.broadcast(tensor, src=0)
    return tensor


def of_all(value: float) -> tuple[float, ...]:
    """Returns what each of the processes that share a model hands in, such as its free memory, in their order."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return tuple(found)
