"""Kernels recorded once as a CUDA graph and played again, so that the GPU does not wait for Python.

CUDA graphs in PyTorch: docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. Owns the recording itself; what may be recorded,
and when, is for those who call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch


def new_pool() -> object:
    """Memory that graphs share which are never played at once."""
    return torch.cuda.graph_pool_handle()


def recorded(work: Callable[[], object], *, pool: object, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Records what `work` starts on the GPU; nothing of it runs until the graph is played.

    Args:
        work: no wait for the GPU and no look at a value in it; it ran before, so that libraries have chosen their kernels.
        pool: from `new_pool`; holds what `work` allocates as long as the graph lives.
        stream: not the default one; what `work` needs has been waited for on it.

    Raises:
        RuntimeError: `work` can't be recorded. PyTorch is left as it was.
        torch.OutOfMemoryError: there is no room for what it allocates.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        # Other threads (of data loaders, of this project's panels) may go on using CUDA meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            try:
                work()
            finally:
                graph.capture_end()
        except BaseException:
            _abandon(graph, pool)
            raise
    return graph


def refusal_of(error: Exception) -> str:
    """Why something was not recorded, in one line; what can't be recorded differs by model, kernel and version."""
    return f"no CUDA graph: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _abandon(graph: torch.cuda.CUDAGraph, pool: object) -> None:
    """Leaves PyTorch as it was before a recording that failed.

    `capture_end` raises before it tells the random generator and the allocator that the recording is over: the next dropout or
    sampled token on this GPU would fail, and memory be put aside for a graph that is gone
    (github.com/pytorch/pytorch/pull/171265). What a newer PyTorch has done itself is refused here, which is as well.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError, AttributeError, TypeError):
        torch._C._cuda_endAllocateToPool(device, pool)
    with contextlib.suppress(RuntimeError):
        graph.reset()
    with contextlib.suppress(RuntimeError, AttributeError, TypeError):
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())  # the same numbers, in a state that nothing records
