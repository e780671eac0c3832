"""A step recorded once as a CUDA graph and played again, so that a small model does not wait for Python.

CUDA graphs in PyTorch: docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. A step that can't be recorded is run as it is, and
the reason kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch


class GraphedStep:
    """Calls `step(rows, length)`, by a graph for each pair of sizes where that can be.

    Args:
        step: changes tensors in place, without waiting for the GPU and without a look at their values.
        state: tensors that the step changes and reads; they are put back after a trial run.
        refusal: why no graph may be recorded, or None.
    """

    def __init__(
        self, step: Callable[[int, int], object], state: Sequence[torch.Tensor], refusal: str | None = None
    ) -> None:
        self._step: Callable[[int, int], object] | None = step
        self._state, self.refusal = state, refusal
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool: object | None = None

    def __call__(self, rows: int, length: int) -> None:
        if self.refusal is None and (rows, length) not in self._graphs:
            try:
                self._graphs[rows, length] = self._recorded(rows, length)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # what can't be recorded differs by model, kernel and version
                self.refusal = f"no CUDA graph: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        graph = self._graphs.get((rows, length))
        if graph is None:
            self._step(rows, length)
        else:
            graph.replay()

    @property
    def recorded(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def release(self) -> None:
        """Drops the graphs with the memory that they hold; no step can be taken after that."""
        self._graphs.clear()
        self._pool, self._step = None, None

    def _recorded(self, rows: int, length: int) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self._state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            self._step(rows, length)  # libraries make their workspaces and choose kernels now, not while recording
            for tensor, value in zip(self._state, before, strict=True):
                tensor.copy_(value)
            torch.cuda.synchronize()
            # torch.cuda.graph() would also collect garbage and empty the cache, at each of several sizes.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                try:
                    self._step(rows, length)
                finally:
                    graph.capture_end()
            except BaseException:
                _abandon(graph, self._pool)
                raise
        torch.cuda.current_stream().wait_stream(stream)
        return graph


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
