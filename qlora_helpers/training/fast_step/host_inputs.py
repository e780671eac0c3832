"""Keeps the inputs of layers with activation checkpointing in the host's memory until the backward pass needs them.

Such a layer keeps only its input, but the inputs of all layers together are what a long batch costs on a small card: Falcon-40B's
take 1.9 GiB for each sequence of 2,048 tokens. They leave for pinned memory on a stream of their own while the layer computes, and
come back while the layer after it is recomputed. A layer's arithmetic takes several times as long as its input's way to the host,
so nothing waits. Values are the same to the bit. It works inside a CUDA graph too: the pass's own stream waits for every copy
before the pass ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _LayerInput:
    """One layer's input: on its device until its copy has arrived, then on the host, then on its device again."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.device, self.shape, self.requires_grad = hidden.device, hidden.shape, hidden.requires_grad
        self.here: torch.Tensor | None = hidden.detach()
        self.host: torch.Tensor | None = None
        self.copied: Any = None  # an event on the copying stream, where a copy is under way


class HostInputs:
    """The inputs of a model's checkpointed layers during one forward and backward pass.

    Attributes:
        bytes_sent: what the last forward pass left in the host's memory.
    """

    def __init__(self) -> None:
        self.bytes_sent = 0
        self._inputs: list[_LayerInput] = []
        self._buffers: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def keep(self, number: int, hidden: torch.Tensor, *, last: bool) -> Callable[[], torch.Tensor]:
        """Takes the input of a layer that is about to run, and returns what gives it back for the recomputation.

        Args:
            number: the layer's place among those that are checkpointed, from 0.
            hidden: `(batch, tokens, hidden)`.
            last: whether it is the last of them, whose input is needed first: it stays on its device.
        """
        if number == 0:
            self._inputs, self.bytes_sent = [], 0
        if self._inputs:
            self._let_go(self._inputs[-1])
        before = self._inputs[-1] if self._inputs else None
        own = _LayerInput(hidden)
        self._inputs.append(own)
        if not last:
            self._send(number, own)

        def fetched() -> torch.Tensor:
            self._bring_back(own)
            if before is not None:
                self._bring_back(before)  # on its way while this layer computes
            self._wait_for_copy(own)
            value, own.here = own.here, None
            assert value is not None
            return value.requires_grad_(own.requires_grad)

        return fetched

    def _send(self, number: int, own: _LayerInput) -> None:
        hidden = own.here
        assert hidden is not None
        size, key = hidden.numel(), (number, hidden.dtype)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=hidden.dtype, pin_memory=own.device.type == "cuda")
        own.host = self._buffers[key][:size].view(own.shape)
        self.bytes_sent += hidden.nbytes
        self._copy(own, hidden, own.host)

    def _let_go(self, own: _LayerInput) -> None:
        """Frees an input on its device once its copy has arrived.

        The pass's stream waits for the copy and may then take the memory again in its own order. `record_stream` would do the same
        without waiting, but keeps the memory until the end of a capture.
        """
        if own.host is not None:
            self._wait_for_copy(own)
            own.here = None

    def _bring_back(self, own: _LayerInput) -> None:
        """Starts an input's way back, unless it is there or on its way."""
        if own.here is None:
            assert own.host is not None
            own.here = torch.empty(own.shape, dtype=own.host.dtype, device=own.device)
            self._copy(own, own.host, own.here)

    def _copy(self, own: _LayerInput, source: torch.Tensor, target: torch.Tensor) -> None:
        if own.device.type != "cuda":
            target.copy_(source)
            return
        stream = self._streams.setdefault(own.device, torch.cuda.Stream(own.device))
        stream.wait_stream(torch.cuda.current_stream(own.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            own.copied = stream.record_event()

    def _wait_for_copy(self, own: _LayerInput) -> None:
        if own.copied is not None:
            torch.cuda.current_stream(own.device).wait_event(own.copied)
            own.copied = None
