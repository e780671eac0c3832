"""Puts attention of our own under a model's layers for a while, whatever family it is of.

Almost all of transformers' models call their attention through one interface, by the name in `config._attn_implementation`, and
hand it what they ask for beside queries, keys and values: a scale, a sliding window, a soft-cap, attention sinks. Falcon calls
PyTorch itself; its attention layers get a forward pass that does what theirs does. Knows nothing of how anybody attends.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange

from qlora_helpers.model.patching import replace_forward
from qlora_helpers.model.wiring import split_falcon_heads

REPLACEABLE = ("sdpa", "eager")
_ASKS_FOR_MORE = (
    "position_bias",
    "block_indices",
    "indices",
)  # what changes scores in ways that no kernel of ours knows


class UnsupportedAttentionError(RuntimeError):
    """A layer asks for something that our attention does not compute; the message says what."""


class AttentionTerms(NamedTuple):
    """What a layer asks of its attention beside queries, keys and values.

    Attributes:
        scale: factor of the scores; None takes `head_dim ** -0.5`.
        window: how many tokens a token sees, itself included; None for all before it.
        softcap: bounds the scores to `softcap * tanh(scores / softcap)`; None doesn't.
        sinks: `(heads,)`, the score of a further place whose value is zero (gpt-oss), or None.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


Attend = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, Any, AttentionTerms], torch.Tensor]
"""Takes the layer, queries of `(batch, tokens, heads, head_dim)`, keys and values of `(batch, places, kv_heads, head_dim)`, the
mask that transformers built, and the terms; returns `(batch, tokens, heads, head_dim)`."""
Takes = Callable[[torch.nn.Module, int, Any], bool]
"""Whether our attention runs, by the layer, its number of queries and the mask; the layer's own runs otherwise."""


@contextmanager
def attention_replaced(model: torch.nn.Module, name: str, attend: Attend, takes: Takes) -> Iterator[None]:
    """While open, the model's layers attend by `attend` wherever `takes` says so.

    Args:
        model: a transformers model, without peft's wrapper around it, whose attention is one of `REPLACEABLE`.
        name: the attention's name in transformers' registry.
        attend: our attention.
        takes: where it runs.
    """
    with ExitStack() as undo:
        for module in model.modules():
            if hasattr(module, "query_key_value") and hasattr(module, "new_decoder_architecture"):
                forward = _falcon_forward(module.forward, attend, takes)
                replace_forward(module, types.MethodType(forward, module), undo)
        if model.config.model_type != "falcon":  # its layers accept no names but sdpa and eager
            undo.enter_context(_registered(model, name, attend, takes))
        yield


@contextmanager
def _registered(model: torch.nn.Module, name: str, attend: Attend, takes: Takes) -> Iterator[None]:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    AttentionInterface.register(name, _attention(attend, takes, lambda module: sdpa_attention_forward))
    AttentionMaskInterface.register(name, sdpa_mask)
    eager = f"{name}_eager"
    AttentionInterface.register(eager, _attention(attend, takes, _eager_attention_of))
    AttentionMaskInterface.register(eager, eager_mask)
    names = {"sdpa": name, "eager": eager}
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    own = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    changed = [(config, implementation) for config, implementation in own if implementation in names]
    for config, implementation in changed:
        config._attn_implementation = names[implementation]
    try:
        yield
    finally:
        for config, implementation in changed:
            config._attn_implementation = implementation


def _eager_attention_of(module: torch.nn.Module) -> Callable[..., Any]:
    """The attention that a layer's own file defines, and that it takes where no other is named."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _attention(
    attend: Attend, takes: Takes, own: Callable[[torch.nn.Module], Callable[..., Any]]
) -> Callable[..., Any]:
    """Makes the function for transformers' registry of attention functions."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Takes `(batch, heads, tokens, head_dim)` each, as transformers does, and returns `(batch, tokens, heads, head_dim)`."""
        if not takes(module, query.shape[2], attention_mask):
            return own(module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        for asked in _ASKS_FOR_MORE:
            if kwargs.get(asked) is not None:
                raise UnsupportedAttentionError(f"its layers ask for attention with {asked}")
        terms = AttentionTerms(scaling, kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux"))
        query, key, value = (
            rearrange(part, "batch heads tokens dim -> batch tokens heads dim") for part in (query, key, value)
        )
        return attend(module, query, key, value, attention_mask, terms), None

    return attention


def _falcon_forward(original: Callable[..., Any], attend: Attend, takes: Takes) -> Callable[..., Any]:
    """Makes a forward pass of Falcon's attention layer in which keys and values keep as few heads as the model has, also cached."""
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
    ) -> tuple[torch.Tensor, Any]:
        if alibi is not None or args or not takes(self, hidden_states.shape[1], attention_mask):
            more = {"layer_past": layer_past, "position_embeddings": position_embeddings, **kwargs}
            return original(hidden_states, alibi, attention_mask, *args, **more)
        query, key, value = split_falcon_heads(self, self.query_key_value(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
        if layer_past is not None:
            key, value = (rearrange(part, "batch tokens heads dim -> batch heads tokens dim") for part in (key, value))
            key, value = layer_past.update(key, value, self.layer_idx)
            key, value = (rearrange(part, "batch heads tokens dim -> batch tokens heads dim") for part in (key, value))
        out = attend(self, query, key, value, attention_mask, AttentionTerms())
        return self.dense(rearrange(out, "batch tokens heads dim -> batch tokens (heads dim)")), None

    return forward
