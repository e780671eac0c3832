"""Averages the adapters' gradients over the processes of a training, once the passes of an optimizer step are done.

DDP does so in hooks that run during the backward pass, one for each parameter. Adapters are a thousandth of a model, so there is
nothing to overlap: their gradients are sent in a few milliseconds. After the passes it costs no hook in them, a pass that is
captured as a CUDA graph stays as it is, compiled layers are not split, and accumulated passes send nothing. It also serves layers
that FSDP2 shares out, whose adapters are whole in every process (`model.sharding`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import distributed

BUCKET_VALUES = 1 << 24  # sent at once: 64 MiB of float32


def processes() -> int:
    """How many processes train together."""
    joined = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if joined else 1


@torch.no_grad()
def average_gradients(weights: Iterable[torch.Tensor]) -> None:
    """Replaces each weight's gradient by its mean over all processes, in place; a missing one counts as zero.

    Args:
        weights: those that are trained, in the same order in every process.
    """
    count = processes()
    if count == 1:
        return
    trained = list(weights)
    for weight in trained:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    for bucket in _buckets([weight.grad for weight in trained]):
        flat = torch.cat([each.reshape(-1) for each in bucket])
        distributed.all_reduce(flat)
        flat /= count
        _copy_back(flat, bucket)


@torch.no_grad()
def copy_from_first(weights: Iterable[torch.Tensor]) -> None:
    """Gives each weight the values that it has in the first process, as DDP does when it begins."""
    if processes() == 1:
        return
    for bucket in _buckets(weights):
        flat = torch.cat([each.reshape(-1) for each in bucket])
        distributed.broadcast(flat, src=0)
        _copy_back(flat, bucket)


def _copy_back(flat: torch.Tensor, bucket: list[torch.Tensor]) -> None:
    parts = flat.split([each.numel() for each in bucket])
    torch._foreach_copy_(bucket, [part.view_as(each) for part, each in zip(parts, bucket, strict=True)])


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yields the tensors in their order, in groups of one data type that hold at most `BUCKET_VALUES`, or one larger tensor."""
    bucket: list[torch.Tensor] = []
    held = 0
    for each in tensors:
        if bucket and (held + each.numel() > BUCKET_VALUES or each.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(each.data)
        held += each.numel()
    if bucket:
        yield bucket
