"""Keeps the input embedding in the host's memory while training: looking up a few rows needs no vocabulary on the GPU.

Llama 8B's embedding takes 1 GiB, which on a small card is one more packed sequence in a batch. Rows are looked up on the host and
sent to the GPU. The batch carries its tokens on the host (`host_tokens`), so that nothing waits for the GPU; where it does not,
they are fetched from the GPU first. Values are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from qlora_helpers.model.patching import replace_forward

_ON_HOST = "_qlora_weight_on_host"


def offload_refusal(model: torch.nn.Module) -> str | None:
    """Says why a model's input embedding must stay on the GPU; None where it can go.

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
def embeddings_on_host(model: torch.nn.Module) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """While open, the weight of the input embedding is in the host's memory.

    Yields a function that looks a batch up: it replaces the tokens by `inputs_embeds`, `(batch, tokens, hidden)` on the host.

    Where the GPU has no memory to take the weight back (after an out-of-memory error, before its frames are cleared), the weight
    stays on the host and works from there until `restore_embedding`.

    Args:
        model: `offload_refusal` gives None for it, and its embedding is on its GPU.
    """
    embedding = model.get_input_embeddings()
    undo, weight = ExitStack(), embedding.weight
    host = weight.data.to("cpu", copy=True)
    device = weight.device
    given: list[torch.Tensor] = []

    def take(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        tokens = kwargs.pop("host_tokens", None)
        given[:] = [] if tokens is None else [tokens.ids]
        return args, kwargs

    def rows_of(tokens: torch.Tensor) -> torch.Tensor:
        # PyTorch's cache reuses pinned memory only once what was sent from it has arrived.
        rows = torch.empty(tokens.numel(), host.shape[1], dtype=host.dtype, pin_memory=device.type == "cuda")
        torch.index_select(host, 0, tokens.reshape(-1), out=rows)
        return rows.reshape(*tokens.shape, host.shape[1])

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        tokens = given.pop() if given and given[0].shape == input_ids.shape else input_ids.to("cpu")
        return rows_of(tokens).to(input_ids.device, non_blocking=True)

    def looked_up(batch: dict[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in batch.items() if name not in ("input_ids", "host_tokens")}
        tokens = batch["host_tokens"].ids if "host_tokens" in batch else batch["input_ids"].to("cpu")
        return rest | {"inputs_embeds": rows_of(tokens)}

    for hook in (
        model.register_forward_pre_hook(take, with_kwargs=True),
        model.register_forward_hook(lambda *_: given.clear(), always_call=True),  # also after an error
    ):
        undo.callback(hook.remove)
    replace_forward(embedding, forward, undo)
    weight.data = torch.empty(0, host.shape[1], dtype=host.dtype, device=device)
    vars(embedding)[_ON_HOST] = (host, device, undo)
    try:
        yield looked_up
    finally:
        with suppress(torch.OutOfMemoryError):  # it stays on the host; the next session tries again
            restore_embedding(embedding)


def restore_embedding(embedding: torch.nn.Module) -> None:
    """Puts a weight that was left on the host back on its GPU; does nothing if none was.

    Raises:
        torch.OutOfMemoryError: there is no room; the weight still works from the host.
    """
    if _ON_HOST not in vars(embedding):
        return
    host, device, undo = vars(embedding)[_ON_HOST]
    embedding.weight.data = host.to(device)
    del vars(embedding)[_ON_HOST]
    undo.close()
