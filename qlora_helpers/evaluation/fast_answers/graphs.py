"""A step recorded once as a CUDA graph and played again, so that a small model does not wait for Python.

A step that can't be recorded is run as it is, and the reason kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qlora_helpers.model import cuda_graphs


class CapturedStep:
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
            except Exception as error:
                self.refusal = cuda_graphs.capture_refusal(error)
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
        if self._pool is None:
            self._pool = cuda_graphs.new_pool()
        with torch.cuda.stream(stream):
            self._step(rows, length)  # libraries make their workspaces and choose kernels now, not while recording
            for tensor, value in zip(self._state, before, strict=True):
                tensor.copy_(value)
            torch.cuda.synchronize()
        graph = cuda_graphs.capture(lambda: self._step(rows, length), pool=self._pool, stream=stream)
        torch.cuda.current_stream().wait_stream(stream)
        return graph
