"""The input embedding kept in the host's memory while training: it is only looked up, and no GPU needs a vocabulary for that.

A Llama of 8 B keeps 1 GiB of it, which is a block more in a small card. The rows are looked up on the host and sent to the GPU; the
host must see the tokens for that, so each forward pass waits once for the GPU. Values are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from qlora_helpers.fast_step.patching import replace_forward

_ON_HOST = "_qlora_weight_on_host"


def offload_refusal(model: torch.nn.Module) -> str | None:
    """Why a model's input embedding must stay where it is; None where it can go.

    Args:
        model: a transformers model, without peft around it.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not torch.nn.Embedding:
        return "the input embedding does more than look up: it stays on the GPU"
    if head is not None and head.weight is embedding.weight:
        return "the output layer has the same weights as the input embedding: it stays on the GPU"
    if embedding.weight.requires_grad:
        return "the input embedding is trained: it stays on the GPU"
    return None


@contextmanager
def embeddings_on_host(model: torch.nn.Module) -> Iterator[None]:
    """While open, the weight of the input embedding lies in the host's memory.

    Where the GPU has no memory to take it back (after an out-of-memory error, before its frames are cleared) it stays on the host
    and works on from there, until `brought_back`.

    Args:
        model: `offload_refusal` gives None for it, and its embedding is on its GPU.
    """
    embedding = model.get_input_embeddings()
    undo, weight = ExitStack(), embedding.weight
    host = weight.data.to("cpu", copy=True)
    device = weight.device
    sent = _Buffer(device)

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        tokens = input_ids.to("cpu")  # waits for the GPU, so what was sent before has arrived
        rows = sent.of(tokens.numel(), host)
        torch.index_select(host, 0, tokens.reshape(-1), out=rows)
        found = rows.to(input_ids.device, non_blocking=True, copy=True)
        return found.reshape(*input_ids.shape, host.shape[1])

    replace_forward(embedding, forward, undo)
    weight.data = torch.empty(0, host.shape[1], dtype=host.dtype, device=device)
    vars(embedding)[_ON_HOST] = (host, device, undo)
    try:
        yield
    finally:
        with suppress(torch.OutOfMemoryError):  # it goes on from the host; the next session tries again
            brought_back(embedding)


def brought_back(embedding: torch.nn.Module) -> None:
    """Puts a weight that was left on the host back on its GPU; does nothing where none was.

    Raises:
        torch.OutOfMemoryError: there is no room; it works on from the host.
    """
    if _ON_HOST not in vars(embedding):
        return
    host, device, undo = vars(embedding)[_ON_HOST]
    embedding.weight.data = host.to(device)
    del vars(embedding)[_ON_HOST]
    undo.close()


class _Buffer:
    """Memory of the host that rows are gathered in; pinned where they go to a GPU, so that the copy waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._memory: torch.Tensor | None = None

    def of(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        if self._memory is None or len(self._memory) < rows:
            self._memory = torch.empty(rows, like.shape[1], dtype=like.dtype, pin_memory=self._pinned)
        return self._memory[:rows]
