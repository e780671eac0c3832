"""Captures GPU work as a CUDA graph, which is replayed without waiting for Python.

See docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. Owns the capture itself; what may be captured, and when, is decided by
those who call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch


def new_pool() -> object:
    """Makes a memory pool for graphs that are never replayed at the same time."""
    return torch.cuda.graph_pool_handle()


def capture(work: Callable[[], object], *, pool: object, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Captures what `work` starts on the GPU; nothing runs until the graph is replayed.

    Args:
        work: never waits for the GPU or reads a value from it; has run before, so that libraries have chosen their kernels.
        pool: from `new_pool`; holds what `work` allocates for as long as the graph lives.
        stream: not the default one; it has waited for what `work` needs.

    Raises:
        RuntimeError: `work` can't be captured. PyTorch is left as it was.
        torch.OutOfMemoryError: `work` allocates more than there is.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        # Other threads (of data loaders, of this project's panels) may use CUDA meanwhile.
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


def capture_refusal(error: Exception) -> str:
    """Says in one line why something was not captured; what can't be captured differs by model, kernel and version."""
    return f"no CUDA graph: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _abandon(graph: torch.cuda.CUDAGraph, pool: object) -> None:
    """Leaves PyTorch as it was before a capture that failed.

    `capture_end` raises before it tells the random generator and the allocator that the capture is over: the next dropout or
    sampled token on this GPU would fail, and memory would stay reserved for a graph that is gone
    (github.com/pytorch/pytorch/pull/171265). Where a newer PyTorch has done this already, the calls here fail, which is harmless.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError, AttributeError, TypeError):
        torch._C._cuda_endAllocateToPool(device, pool)
    with contextlib.suppress(RuntimeError):
        graph.reset()
    with contextlib.suppress(RuntimeError, AttributeError, TypeError):
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())  # the same numbers, in a state that no capture uses
