"""Attention of one new token to the keys before it, without a copy of the keys for every query head.

Where several query heads share keys (grouped and multi-query attention), transformers repeats keys and values before attention, at
every layer and token. The heads of a group query the same keys: taken as several queries of one head they need no copy. Falcon
also stores the copies in its cache; here it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from qlora_helpers.model.attention import AttentionTerms, UnsupportedAttentionError, attention_replaced
from qlora_helpers.model.wiring import base_model_of, in_eval_mode

NAME = "shared_keys"


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention with fewer heads of keys than of queries.

    Args:
        query: `(batch, heads, tokens, head_dim)`.
        key, value: `(batch, kv_heads, places, head_dim)`; `heads` is a multiple of `kv_heads`.
        mask: `(batch, 1, tokens, places)`, additive or boolean, or of its own for each query head; None is causal.
        scale: of queries times keys; None takes `head_dim ** -0.5`.

    Returns:
        `(batch, heads, tokens, head_dim)`.
    """
    group = query.shape[1] // key.shape[1]
    if query.shape[2] == 1 and group > 1:
        several = rearrange(query, "batch (kv group) 1 dim -> batch kv group dim", group=group)
        if mask is not None and mask.shape[1] > 1:
            mask = rearrange(mask, "batch (kv group) 1 places -> batch kv group places", group=group)
        out = F.scaled_dot_product_attention(several, key, value, attn_mask=mask, scale=scale)
        return rearrange(out, "batch kv group dim -> batch (kv group) 1 dim")
    if group > 1:
        key, value = (
            repeat(x, "batch kv places dim -> batch (kv group) places dim", group=group) for x in (key, value)
        )
    causal = mask is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


@contextmanager
def keys_shared(model: torch.nn.Module) -> Iterator[bool]:
    """While open, a causal language model uses `attend`; yields whether it does.

    Args:
        model: with or without adapters; attention other than sdpa is left as it is.
    """
    inner = base_model_of(model)
    text = inner.config.get_text_config()
    if text._attn_implementation != "sdpa" or getattr(text, "attn_logit_softcapping", None):
        yield False
        return
    if _asks_for_more(inner):
        yield False
        return
    is_falcon = text.model_type == "falcon"  # whose cache then holds as few heads from the first token on

    def takes(module: torch.nn.Module, tokens: int, mask: Any) -> bool:
        return is_falcon or (tokens == 1 and mask is not None)

    with attention_replaced(inner, NAME, _attend, takes):
        yield True


def _asks_for_more(model: torch.nn.Module) -> bool:
    """Whether a model's layers ask for what `attend` does not do, such as attention to chosen places alone (DeepSeek-V3.2)."""
    ids = torch.arange(2, 6, device=model.get_input_embeddings().weight.device)[None]
    try:
        with torch.no_grad(), in_eval_mode(model), attention_replaced(model, NAME, _attend, lambda *layer: True):
            model(input_ids=ids, use_cache=False)
    except UnsupportedAttentionError:
        return True
    return False


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    terms: AttentionTerms,
) -> torch.Tensor:
    if terms.softcap is not None or terms.sinks is not None:  # a window is in the mask
        raise UnsupportedAttentionError("its layers ask for a soft-cap or for sinks")
    query, key, value = (
        rearrange(part, "batch tokens heads dim -> batch heads tokens dim") for part in (query, key, value)
    )
    out = attend(query, key, value, mask, scale=terms.scale)
    return rearrange(out, "batch heads tokens dim -> batch tokens heads dim")
