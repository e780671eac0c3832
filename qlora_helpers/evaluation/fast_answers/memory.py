"""Memory that answering takes, by arithmetic, and memory that is free."""

from __future__ import annotations

from typing import Any

import torch

from qlora_helpers.planning.step_settings import SINGLE

SPARE_SHARE = 0.1  # of the free memory that stays free


def usable_bytes(model: torch.nn.Module) -> float:
    """Memory that answering may take where the model is."""
    return (1 - SPARE_SHARE) * free_bytes(model)


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
    """
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    # Falcon's own eager attention keeps a copy of the keys for every query head.
    copied = getattr(text, "new_decoder_architecture", False) and text._attn_implementation == "eager"
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept_per_layer = 2 * (heads if copied else _kv_heads(text)) * width * tokens
    value_bytes = model.dtype.itemsize
    logits = text.vocab_size * (value_bytes + SINGLE)  # also in float32
    return rows * (text.num_hidden_layers * kept_per_layer * value_bytes + logits)


def _kv_heads(text: Any) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    return getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or text.num_attention_heads


def empty_cache() -> None:
    """Gives memory that PyTorch keeps for later back to the GPU, so that it can be divided anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
