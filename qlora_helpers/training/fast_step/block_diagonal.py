"""Attention inside the rows of a packed block, without a mask.

A block-diagonal mask costs work for every pair of tokens in the block, also for pairs of two rows. Here each row is its own short
sequence: on a GPU one call of FlashAttention's variable-length kernel (Dao 2023, arXiv:2307.08691) for all rows, on a CPU one
causal call a row. The starts of the rows reach the layers beside the model's own arguments, so it also works where a model hands
nothing of the kind to its layers (Falcon).
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from qlora_helpers.model.patching import attention_replaced, replace_forward
from qlora_helpers.model.wiring import split_falcon_heads

NAME = "block_diagonal"


class RowStarts:
    """Where rows start in the batch at hand; shared by all attention layers on one device.

    Attributes:
        starts: `(rows + 1,)`, int32: first token of each row in the flattened batch, then the number of tokens. May end in several
            equal numbers, so that its length is the same in every batch. None while no packed batch runs.
        longest: an upper bound on a row's tokens.
    """

    def __init__(self, device: torch.device, longest: int) -> None:
        self.device, self.longest = device, longest
        self.starts: torch.Tensor | None = None


def attend_in_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: RowStarts, *, scale: float | None = None
) -> torch.Tensor:
    """Causal attention in which a token sees the tokens of its own row alone.

    Args:
        query: `(batch, tokens, heads, head_dim)`.
        key, value: `(batch, tokens, kv_heads, head_dim)`; `heads` is a multiple of `kv_heads`.
        rows: where rows start in the flattened batch.
        scale: of the products; None takes `head_dim ** -0.5`.

    Returns:
        `(batch, tokens, heads, head_dim)`.
    """
    batch = query.shape[0]
    # A view of a fused projection would keep all of it for the backward pass.
    key, value = key.contiguous(), value.contiguous()
    flat = [rearrange(part, "batch tokens heads dim -> (batch tokens) heads dim") for part in (query, key, value)]
    out = _by_kernel(*flat, rows, scale) if query.is_cuda else _row_by_row(*flat, rows, scale)
    return rearrange(out, "(batch tokens) heads dim -> batch tokens heads dim", batch=batch)


def kernel_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the variable-length kernel can't run, or None where it can. On a CPU none is needed."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no variable-length attention on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"variable-length attention takes 16-bit types, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "variable-length attention needs a GPU of compute capability 8.0 or newer"
    if head_dim > 256:
        return f"variable-length attention takes heads of at most 256 values, not {head_dim}"
    return None


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: RowStarts, scale: float | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if _ASKS_FOR_GROUPS and key.shape[1] != query.shape[1] else {}
    return varlen_attn(
        query,
        key,
        value,
        rows.starts,
        rows.starts,
        rows.longest,
        rows.longest,
        scale=scale,
        window_size=(-1, 0),
        **grouped,
    )


def _asks_for_groups() -> bool:
    """torch 2.11 takes fewer key and value heads as they come, later versions want to be told."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


_ASKS_FOR_GROUPS = _asks_for_groups()


def _row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: RowStarts, scale: float | None
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    query = rearrange(query, "tokens heads dim -> 1 heads tokens dim")
    key, value = (repeat(part, "tokens heads dim -> 1 (heads group) tokens dim", group=group) for part in (key, value))
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, first:end], key[:, :, first:end], value[:, :, first:end], is_causal=True, scale=scale
        )
        for first, end in pairwise(rows.starts.tolist())
        if end > first
    ]
    return rearrange(torch.cat(parts, dim=2), "1 heads tokens dim -> tokens heads dim")


# into a model


@contextmanager
def block_diagonal_attention(model: torch.nn.Module, *, longest: int) -> Iterator[None]:
    """While open, a causal language model takes `row_starts` in place of a mask. Without them it attends as before.

    Args:
        model: a transformers model, without peft's wrapper around it.
        longest: an upper bound on a row's tokens.
    """
    by_device: dict[torch.device, RowStarts] = {}
    with ExitStack() as undo:
        for module in model.modules():
            if not hasattr(module, "is_causal"):  # what transformers' attention layers have in common
                continue
            device = next(module.parameters()).device
            module.row_starts = by_device.setdefault(device, RowStarts(device, longest))
            undo.callback(delattr, module, "row_starts")
            if hasattr(module, "query_key_value") and hasattr(module, "new_decoder_architecture"):
                replace_forward(module, types.MethodType(_falcon_forward(module.forward), module), undo)
        if model.config.model_type != "falcon":  # whose layers know no names but sdpa and eager
            undo.enter_context(attention_replaced(model, NAME, _attention()))
        hook = model.register_forward_pre_hook(_take_row_starts(list(by_device.values())), with_kwargs=True)
        undo.callback(hook.remove)
        yield


def _take_row_starts(places: list[RowStarts]) -> Callable[..., Any]:
    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        starts = kwargs.pop("row_starts", None)
        for place in places:
            place.starts = starts if starts is None else starts.to(place.device, non_blocking=True)
        if starts is not None:
            # A mask of four dimensions goes through to the layers as it is, so transformers builds none of its own.
            kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=places[0].device)
        return args, kwargs

    return hook


def _attention() -> Callable[..., Any]:
    """For transformers' registry of attention functions."""
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
        """`(batch, heads, tokens, head_dim)` each, as transformers hands them over; `(batch, tokens, heads, head_dim)` back."""
        if module.row_starts.starts is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        by_token = [rearrange(part, "batch heads tokens dim -> batch tokens heads dim") for part in (query, key, value)]
        return attend_in_rows(*by_token, module.row_starts, scale=scaling), None

    return attention


def _falcon_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Falcon's attention layer within rows; keys and values stay as few heads as the model has."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    def forward(
        self: Any, hidden_states: torch.Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if self.row_starts.starts is None:
            return original(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        query, key, value = split_falcon_heads(self, self.query_key_value(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
        out = attend_in_rows(query, key, value, self.row_starts)
        return self.dense(rearrange(out, "batch tokens heads dim -> batch tokens (heads dim)")), None

    return forward
