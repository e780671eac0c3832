"""A step that is captured once as a CUDA graph and then replayed, so that a small model does not wait for Python.

A step that can't be captured is run as it is, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qlora_helpers.model import cuda_graphs


class CapturedStep:
    """Calls `step(rows, length)`, where possible by replaying a graph for each pair of sizes.

    Args:
        step: changes tensors in place; it never waits for the GPU and never looks at their values.
        state: tensors that the step reads and changes; they are restored after a trial run.
        refusal: why no graph can be captured, or None.
    """

    def __init__(
        self, step: Callable[[int, int], object], state: Sequence[torch.Tensor], refusal: str | None = None
    ) -> None:
        self._step: Any = step
        self._state, self.refusal = state, refusal
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool: object | None = None

    def __call__(self, rows: int, length: int) -> None:
        if self.refusal is None and (rows, length) not in self._graphs:
            try:
                self._graphs[rows, length] = self._capture(rows, length)
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
    def captured(self) -> int:
        """How many graphs were captured."""
        return len(self._graphs)

    def release(self) -> None:
        """Frees the graphs with the memory that they hold; after that no step can be taken."""
        self._graphs.clear()
        self._pool, self._step = None, None

    def _capture(self, rows: int, length: int) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self._state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        if self._pool is None:
            self._pool = cuda_graphs.new_pool()
        with torch.cuda.stream(stream):
            self._step(rows, length)  # libraries make their workspaces and choose kernels now, not during the capture
            for tensor, value in zip(self._state, before, strict=True):
                tensor.copy_(value)
            torch.cuda.synchronize()
        graph = cuda_graphs.capture(lambda: self._step(rows, length), pool=self._pool, stream=stream)
        torch.cuda.current_stream().wait_stream(stream)
        return graph
