"""Block-diagonal attention without a mask: the rows of a packed sequence do not attend to each other.

A block-diagonal mask costs work for every pair of tokens in the packed sequence, also for pairs from two rows. Here each row is a
short sequence of its own: on a GPU, FlashAttention's variable-length kernel (Dao 2023, arXiv:2307.08691) takes all rows at once; on
a CPU, each row takes one causal call. The starts of the rows reach the layers beside the model's own arguments, so this also
works for models that pass nothing of the kind to their layers (Falcon).
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
    """Where the rows of the current batch start; shared by all attention layers on one device.

    Attributes:
        starts: `(rows + 1,)`, int32: the first token of each row in the flattened batch, then the number of tokens. May end in
            several equal numbers, so that every batch has the same length. None while no packed batch runs.
        longest: an upper bound on a row's tokens.
    """

    def __init__(self, device: torch.device, longest: int) -> None:
        self.device, self.longest = device, longest
        self.starts: Any = None


def attend_within_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: RowStarts, *, scale: float | None = None
) -> torch.Tensor:
    """Computes causal attention in which a token sees only the tokens of its own row.

    Args:
        query: `(batch, tokens, heads, head_dim)`.
        key, value: `(batch, tokens, kv_heads, head_dim)`; `heads` is a multiple of `kv_heads`.
        rows: where rows start in the flattened batch.
        scale: factor of the attention scores; None takes `head_dim ** -0.5`.

    Returns:
        `(batch, tokens, heads, head_dim)`.
    """
    batch = query.shape[0]
    # A view would keep the whole fused projection for the backward pass.
    key, value = key.contiguous(), value.contiguous()
    query, key, value = (
        rearrange(part, "batch tokens heads dim -> (batch tokens) heads dim") for part in (query, key, value)
    )
    attend = _by_kernel if query.is_cuda else _row_by_row
    out = attend(query, key, value, rows, scale)
    return rearrange(out, "(batch tokens) heads dim -> batch tokens heads dim", batch=batch)


def kernel_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Says why the variable-length kernel can't run, or None where it can. A CPU needs no kernel."""
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


def block_diagonal_refusal(model: torch.nn.Module) -> str | None:
    """Says why a model's attention can't be replaced by this one, or None where it can.

    Args:
        model: a transformers model, without peft's wrapper around it.
    """
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    refusal = kernel_refusal(model.get_input_embeddings().weight.device, model.dtype, head_dim)
    if refusal is not None:
        return refusal
    if text._attn_implementation != "sdpa":
        return f"attention is {text._attn_implementation}: only sdpa's is replaced"
    if getattr(text, "attn_logit_softcapping", None):
        return "the model bounds its attention scores (soft-capping), which the kernel does not"
    if getattr(text, "attention_dropout", 0.0):
        return "the model drops attention scores while it trains, which the kernel does not"
    return None


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: RowStarts, scale: float | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if _NEEDS_ENABLE_GQA and key.shape[1] != query.shape[1] else {}
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


def _needs_enable_gqa() -> bool:
    """Whether the kernel must be told of fewer key and value heads: torch 2.11 takes them as they are, later versions don't."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


_NEEDS_ENABLE_GQA = _needs_enable_gqa()


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


@contextmanager
def block_diagonal_attention(model: torch.nn.Module, *, longest: int) -> Iterator[None]:
    """While open, a causal language model takes `row_starts` instead of a mask. Without them it attends as before.

    Args:
        model: a transformers model, without peft's wrapper around it.
        longest: an upper bound on a row's tokens.
    """
    by_device: dict[torch.device, RowStarts] = {}
    with ExitStack() as undo:
        for module in model.modules():
            if not hasattr(module, "is_causal"):  # which all of transformers' attention layers have
                continue
            device = next(module.parameters()).device
            module.row_starts = by_device.setdefault(device, RowStarts(device, longest))
            undo.callback(delattr, module, "row_starts")
            if hasattr(module, "query_key_value") and hasattr(module, "new_decoder_architecture"):
                replace_forward(module, types.MethodType(_falcon_forward(module.forward), module), undo)
        if model.config.model_type != "falcon":  # its layers accept no names but sdpa and eager
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
            # transformers passes a mask of four dimensions on unchanged, and so builds none of its own.
            kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=places[0].device)
        return args, kwargs

    return hook


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
        """Takes `(batch, heads, tokens, head_dim)` each, as transformers does, and returns `(batch, tokens, heads, head_dim)`."""
        if module.row_starts.starts is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        query, key, value = (
            rearrange(part, "batch heads tokens dim -> batch tokens heads dim") for part in (query, key, value)
        )
        return attend_within_rows(query, key, value, module.row_starts, scale=scaling), None

    return attention


def _falcon_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes Falcon's attention layer attend within rows; keys and values keep as few heads as the model has."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    def forward(
        self: Any, hidden_states: torch.Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if self.row_starts.starts is None:
            return original(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        query, key, value = split_falcon_heads(self, self.query_key_value(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
        out = attend_within_rows(query, key, value, self.row_starts)
        return self.dense(rearrange(out, "batch tokens heads dim -> batch tokens (heads dim)")), None

    return forward
