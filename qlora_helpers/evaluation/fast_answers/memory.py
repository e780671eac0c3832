"""Memory that answering takes, by arithmetic, and memory that is free."""

from __future__ import annotations

import torch

from qlora_helpers.evaluation.fast_answers.attention import keys_shared
from qlora_helpers.evaluation.fast_answers.decoder import NotFast, SlotDecoder, unusable_cache_explained
from qlora_helpers.model.sharding import is_sharded, of_all
from qlora_helpers.planning.step_settings import SINGLE

SPARE_SHARE = 0.1  # of the free memory that stays free


def usable_bytes(model: torch.nn.Module) -> float:
    """Memory that answering may take where the model is; of processes that share it, where there is least."""
    usable = (1 - SPARE_SHARE) * free_bytes(model)
    return min(of_all(usable)) if is_sharded(model) else usable


def free_bytes(model: torch.nn.Module) -> int:
    """Memory that is free where the model is: on its GPUs, or of the machine."""
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type == "cpu" for device in devices):
        import psutil

        return psutil.virtual_memory().available
    free = []
    for device in devices:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free.append(torch.cuda.mem_get_info(device)[0] + unused)
    # Layers, and with them copies and cache, are spread evenly: the fullest GPU is the limit.
    return min(free) * len(free)


def cache_bytes(model: torch.nn.Module, rows: int, tokens: int) -> int:
    """Memory that answering takes beside the weights: the keys and values of every token, and the logits of one step.

    Args:
        model: with or without adapters.
        rows: answers at once.
        tokens: of the longest prompt with its answer.

    Raises:
        NotFast: the model keeps something else of a token than keys and values.
    """
    logits = model.get_input_embeddings().num_embeddings * (model.dtype.itemsize + SINGLE)  # also in float32
    return rows * (tokens * bytes_a_token(model) + logits)


def bytes_a_token(model: torch.nn.Module) -> int:
    """Bytes that our cache keeps of one token, over all layers.

    The model is asked for them with one token: sizes of heads have many names in configs, and may differ from layer to layer.

    Raises:
        NotFast: the model can't use our cache.
    """
    with keys_shared(model):
        decoder = SlotDecoder(model, slots=1, capacity=1, graph_refusal="one token")
        try:
            with unusable_cache_explained():
                decoder.read([0], [[0]], 0)
            if not decoder.cache.keys:
                raise NotFast("the model puts nothing into our cache")
            return decoder.cache.bytes_a_token()
        finally:
            decoder.release()


def empty_cache() -> None:
    """Gives memory that PyTorch keeps for later back to the GPU, so that it can be divided anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
