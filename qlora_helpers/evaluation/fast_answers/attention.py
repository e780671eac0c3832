"""Attention of one new token to the keys before it, without a copy of the keys for every query head.

Where several query heads share keys (grouped and multi-query attention), transformers repeats keys and values before attention, at
every layer and token. The heads of a group query the same keys: taken as several queries of one head they need no copy. Falcon
also stores the copies in its cache; here it does not.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from qlora_helpers.model.patching import attention_replaced, replace_forward
from qlora_helpers.model.wiring import base_model_of, split_falcon_heads

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
        mask: `(batch, 1, tokens, places)`, additive or boolean; None is causal.
        scale: of queries times keys; None takes `head_dim ** -0.5`.

    Returns:
        `(batch, heads, tokens, head_dim)`.
    """
    group = query.shape[1] // key.shape[1]
    if query.shape[2] == 1 and group > 1:
        several = rearrange(query, "batch (kv group) 1 dim -> batch kv group dim", group=group)
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
    with ExitStack() as undo:
        if text.model_type == "falcon":
            for module in inner.modules():
                if hasattr(module, "query_key_value") and hasattr(module, "new_decoder_architecture"):
                    replace_forward(module, types.MethodType(_falcon_forward(module.forward), module), undo)
        else:
            undo.enter_context(attention_replaced(inner, NAME, _attention()))
        yield True


def _attention() -> Callable[..., Any]:
    """Makes the function for transformers' registry of attention functions."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if query.shape[2] != 1 or attention_mask is None or kwargs.get("position_bias") is not None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return attend(query, key, value, attention_mask, scale=scaling).transpose(1, 2), None

    return attention


def _falcon_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a forward of Falcon's attention layer whose cache holds only as many heads of keys as the model has."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        alibi: Any = None,
        attention_mask: Any = None,
        *args: Any,
        layer_past: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if alibi is not None or args:
            return original(
                hidden_states,
                alibi,
                attention_mask,
                *args,
                layer_past=layer_past,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        query, key, value = split_falcon_heads(self, self.query_key_value(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
        query, key, value = (
            rearrange(x, "batch tokens heads dim -> batch heads tokens dim") for x in (query, key, value)
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out = attend(query, key, value, attention_mask)
        return self.dense(rearrange(out, "batch heads tokens dim -> batch tokens (heads dim)")), None

    return forward
