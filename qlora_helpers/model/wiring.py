"""How a loaded model is put together, found on the model itself: decoder layers, devices, arguments, the loss of each row."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange

from qlora_helpers.data.labels import IGNORED


def base_model_of(model: torch.nn.Module) -> Any:
    """The model under a peft model's adapters; a model without adapters is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into eval mode while open, and then back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def takes_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether a model can compute its logits at chosen positions only."""
    return "logits_to_keep" in inspect.signature(base_model_of(model).forward).parameters


def can_recompute(model: torch.nn.Module) -> bool:
    """Whether transformers can recompute a model's activations in the backward pass, as it can't for CTRL and the first GPT."""
    names = ("supports_activation_checkpointing", "supports_gradient_checkpointing")  # by transformers' version
    return any(getattr(base_model_of(model), name, False) for name in names)


def windows_of(owner: Any) -> list[tuple[str, int]]:
    """Lists the attributes of a config or a layer that say how many tokens a token sees: sliding windows, chunks.

    Args:
        owner: `sliding_window`, `window_size` and the like are looked up in its own attributes.
    """
    return [
        (name, value)
        for name, value in getattr(owner, "__dict__", {}).items()
        if name.endswith(("window", "window_size", "attention_chunk_size"))
        and not name.startswith("_")
        and isinstance(value, int)
        and not isinstance(value, bool)
        and value > 0
    ]


def is_spread(model: torch.nn.Module) -> bool:
    """Whether a model's layers are on several devices."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def row_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the loss over the trained tokens of each sequence of a batch.

    Args:
        model: a causal language model that returns logits, with or without adapters.
        batch: what `SequenceCollator` made.

    Returns:
        The sums in nats and the numbers of trained tokens, `(batch,)` each.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "shift_labels")}
    logits = model(**inputs).logits.float()
    shifted = batch.get("shift_labels")
    if shifted is None:
        logits, shifted = logits[:, :-1], batch["labels"][:, 1:]
    # Rows are flattened, since on a CPU a softmax over a dimension that is not the last one adds up inexactly.
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), shifted.to(logits.device).flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(shifted.shape).sum(dim=1), shifted.ne(IGNORED).sum(dim=1).to(losses.device)


def text_decoder(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the part of a model that continues text: of a multimodal checkpoint its language model, without the vision tower."""
    inner = base_model_of(model)
    found = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    if not isinstance(found, torch.nn.Module) or not any(
        True for _ in found.children()
    ):  # ModernBERT's is its output layer
        return inner
    return found


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the decoder layers of a causal language model in their order, also where they are of several classes.

    They are what transformers would recompute under activation checkpointing; where a model has nothing of that kind, they are
    its longest list of modules of one class.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[torch.nn.Module] = []
    inside: set[int] = set()
    for module in text_decoder(model).modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside.update(id(part) for part in module.modules())
    if found:
        return found
    lists = [
        list(module)
        for module in text_decoder(model).modules()
        if isinstance(module, torch.nn.ModuleList) and len({type(item) for item in module}) == 1
    ]
    return max(lists, key=len, default=[])


def split_falcon_heads(layer: Any, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits Falcon's fused projection into queries, keys and values.

    Args:
        layer: the attention layer; says which of Falcon's three layouts it has.
        fused: `(batch, tokens, features)`.

    Returns:
        Queries, keys and values, `(batch, tokens, heads, head_dim)` each, with their own numbers of heads.
    """
    dim = layer.head_dim
    if layer.new_decoder_architecture:  # groups of queries, each with one key and one value
        groups = rearrange(
            fused, "batch tokens (group part dim) -> batch tokens group part dim", dim=dim, group=layer.num_kv_heads
        )
        query = rearrange(groups[..., :-2, :], "batch tokens group part dim -> batch tokens (group part) dim")
        return query, groups[..., -2, :], groups[..., -1, :]
    if layer.multi_query:  # all queries, then one key and one value
        heads = rearrange(fused, "batch tokens (heads dim) -> batch tokens heads dim", dim=dim)
        return heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :]
    query, key, value = rearrange(
        fused, "batch tokens (heads three dim) -> three batch tokens heads dim", three=3, dim=dim
    )
    return query, key, value


def is_plain_lora(layer: Any, adapter: str | None = None) -> bool:
    """Whether a LoRA layer is two matrices beside a linear layer: one adapter, not merged, without DoRA and bias.

    Args:
        layer: a layer of peft's.
        adapter: the adapter that is looked at; None takes the active one.
    """
    names = list(layer.active_adapters) if adapter is None else [adapter]
    if len(names) != 1 or names[0] not in layer.lora_A or layer.merged:
        return False
    (name,) = names
    linear = isinstance(layer.lora_A[name], torch.nn.Linear) and isinstance(layer.get_base_layer(), torch.nn.Linear)
    return linear and name not in getattr(layer, "lora_variant", {}) and not layer.lora_bias.get(name, False)
