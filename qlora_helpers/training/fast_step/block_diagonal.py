"""Block-diagonal attention without a mask: the rows of a packed sequence do not attend to each other.

A block-diagonal mask costs work for every pair of tokens in the packed sequence, also for pairs from two rows. Here each row is a
short sequence of its own: on a GPU, FlashAttention's variable-length kernel (Dao 2023, arXiv:2307.08691) takes all rows at once; on
a CPU, each row takes one causal call. Sliding windows, attention sinks and soft-caps are computed too; soft-caps and heads wider
than the kernel takes go to flex attention on a GPU (`flex_rows`). The starts of the rows reach the layers beside the model's own
arguments, so this also works for models that pass nothing of the kind to their layers (Falcon).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch._dynamo.config
import torch.nn.functional as F
from einops import rearrange, repeat

from qlora_helpers.data.batches import RowBounds
from qlora_helpers.model.attention import (
    REPLACEABLE,
    AttentionTerms,
    attention_replaced,
)
from qlora_helpers.training.fast_step.flex_rows import RowMasks, attend_by_flex, attend_where_seen
from qlora_helpers.training.fast_step.layers import MOST_KINDS
from qlora_helpers.training.proving import why_it_fails
from qlora_helpers.training.row_isolation import has_state, prove_gradients, prove_isolation

NAME = "block_diagonal"
WIDEST_HEAD = 256  # values of a head that the variable-length kernel takes
log = logging.getLogger(__name__)


class RowStarts:
    """Where the rows of the current batch start; shared by all attention layers on one device.

    Attributes:
        starts: `(rows + 1,)`, int32: the first token of each row in the flattened batch, then the number of tokens. May end in
            several equal numbers, so that every batch has the same length. None while no packed batch runs.
        longest: an upper bound on a row's tokens.
        masks: for layers that attend by flex attention.
    """

    def __init__(self, device: torch.device, longest: int, say: Callable[[str], None] = log.warning) -> None:
        self.device, self.longest = device, longest
        self.starts: Any = None
        self.masks = RowMasks(say)

    def begin(self, starts: torch.Tensor | None, tokens: int | None = None) -> None:
        """Takes where the rows of the next batch start, or None where it has none, and its number of tokens, if known."""
        self.starts = None if starts is None else starts.to(self.device, non_blocking=True)
        self.masks.begin(self.starts, tokens)


def attend_within_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RowStarts,
    terms: AttentionTerms = AttentionTerms(),  # noqa: B008 (a tuple never changes)
) -> torch.Tensor:
    """Computes causal attention in which a token sees only the tokens of its own row.

    Args:
        query: `(batch, tokens, heads, head_dim)`.
        key, value: `(batch, tokens, kv_heads, head_dim)`; `heads` is a multiple of `kv_heads`.
        rows: where rows start in the flattened batch.
        terms: scale, window, soft-cap and sinks.

    Returns:
        `(batch, tokens, heads, head_dim)`.
    """
    batch = query.shape[0]
    # A view would keep the whole fused projection for the backward pass.
    key, value = key.contiguous(), value.contiguous()
    query, key, value = (
        rearrange(part, "batch tokens heads dim -> (batch tokens) heads dim") for part in (query, key, value)
    )
    windowed = terms.window is not None and terms.window < rows.longest
    if query.is_cuda and (terms.softcap is not None or query.shape[-1] > WIDEST_HEAD):
        out = attend_by_flex(query, key, value, rows.masks, terms, terms.window if windowed else None, batch)
    elif windowed or terms.softcap is not None or terms.sinks is not None:
        attend_on = _by_kernel_on_terms if query.is_cuda else _row_by_row_on_terms
        out = attend_on(query, key, value, rows, terms)
    else:
        attend = _by_kernel if query.is_cuda else _row_by_row
        out = attend(query, key, value, rows, terms.scale)
    return rearrange(out, "(batch tokens) heads dim -> batch tokens heads dim", batch=batch)


def kernel_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Says why the variable-length kernel can't run, or None where it can. A CPU needs no kernel."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no variable-length attention on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"variable-length attention takes 16-bit types, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "variable-length attention needs a GPU of compute capability 8.0 or newer"
    return None


def block_diagonal_refusal(model: torch.nn.Module, longest: int) -> str | None:
    """Says why a model's attention can't be replaced by this one, or None where it is proved on the model that it can.

    Args:
        model: a transformers model, without peft's wrapper around it.
        longest: an upper bound on a row's tokens.
    """
    text = model.config.get_text_config()
    refusal = kernel_refusal(model.get_input_embeddings().weight.device, model.dtype)
    if refusal is not None:
        return refusal
    if text._attn_implementation not in REPLACEABLE:
        return f"attention is {text._attn_implementation}: only {' and '.join(REPLACEABLE)} are replaced"
    if any("drop" in name and "att" in name and share for name, share in text.to_dict().items()):
        return "the model drops attention scores while it trains, which the kernel does not"

    def attempt() -> None:
        with block_diagonal_attention(model, longest=longest, say=log.debug):
            attention = RowBounds(2, has_state(model))
            prove_isolation(model, attention, longest)
            prove_gradients(model, attention, longest)

    why = why_it_fails(attempt, "it fails with block-diagonal attention")
    return None if why is None else f"no block-diagonal attention without a mask: {why}"


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RowStarts,
    scale: float | None,
    before: int = -1,
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
        window_size=(before, 0),
        **grouped,
    )


def _by_kernel_on_terms(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: RowStarts, terms: AttentionTerms
) -> torch.Tensor:
    before = -1 if terms.window is None or terms.window >= rows.longest else terms.window - 1
    if terms.sinks is not None:
        scale = query.shape[-1] ** -0.5 if terms.scale is None else terms.scale
        return _WithSinks.apply(query, key, value, rows.starts, terms.sinks, rows.longest, scale, before)
    return _by_kernel(query, key, value, rows, terms.scale, before)


def _needs_enable_gqa() -> bool:
    """Whether the kernel needs a flag for fewer key and value heads: torch 2.11 takes them as they are, later versions don't."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


_NEEDS_ENABLE_GQA = _needs_enable_gqa()


class _WithSinks(torch.autograd.Function):
    """The variable-length kernel's attention, in which every softmax has one more place, of a fixed score and no value.

    The kernel returns each softmax's log-sum-exp; a further score scales its output by `sigmoid(lse - sink)`. The kernel's backward
    pass computes probabilities from the log-sum-exp that it is given, and their common slope from the output: given both with the
    sink, its gradients are those with the sink. Sinks are frozen and get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        sinks: torch.Tensor,
        longest: int,
        scale: float,
        before: int,
    ) -> torch.Tensor:
        out, sums, state, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            starts,
            starts,
            longest,
            longest,
            0.0,
            before == -1,
            return_debug_mask=False,
            scale=scale,
            window_size_left=before,
            window_size_right=0,
        )
        sinks = sinks.to(sums.dtype).unsqueeze(1)  # sums: `(heads, tokens)`, float32
        kept = torch.sigmoid(sums - sinks).transpose(0, 1).unsqueeze(2)
        out = (out * kept).to(query.dtype)
        ctx.save_for_backward(query, key, value, starts, out, torch.logaddexp(sums, sinks), state)
        ctx.more = longest, scale, before
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, starts, out, sums, state = ctx.saved_tensors
        longest, scale, before = ctx.more
        gradients = torch.ops.aten._flash_attention_backward(
            upstream.contiguous(),
            query,
            key,
            value,
            out,
            sums,
            starts,
            starts,
            longest,
            longest,
            0.0,
            before == -1,
            state,
            torch.empty(0, device=query.device),
            scale=scale,
            window_size_left=before,
            window_size_right=0,
        )
        return *gradients, None, None, None, None, None


def _row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: RowStarts, scale: float | None
) -> torch.Tensor:
    return _row_by_row_on_terms(query, key, value, rows, AttentionTerms(scale))


def _row_by_row_on_terms(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: RowStarts, terms: AttentionTerms
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    query = rearrange(query, "tokens heads dim -> 1 heads tokens dim")
    key, value = (repeat(part, "tokens heads dim -> 1 (heads group) tokens dim", group=group) for part in (key, value))
    parts = [
        _attend_in_row(query[:, :, first:end], key[:, :, first:end], value[:, :, first:end], terms)
        for first, end in pairwise(rows.starts.tolist())
        if end > first
    ]
    return rearrange(torch.cat(parts, dim=2), "1 heads tokens dim -> tokens heads dim").contiguous()


def _attend_in_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: AttentionTerms) -> torch.Tensor:
    """Causal attention of one row, `(1, heads, tokens, head_dim)` each."""
    tokens = query.shape[2]
    window = tokens if terms.window is None else min(terms.window, tokens)
    if window == tokens and terms.softcap is None and terms.sinks is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=terms.scale)
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return attend_where_seen(query, key, value, seen, terms)


@contextmanager
def block_diagonal_attention(
    model: torch.nn.Module, *, longest: int, say: Callable[[str], None] = log.warning
) -> Iterator[None]:
    """While open, a causal language model takes `row_starts` instead of a mask. Without them it attends as before.

    Args:
        model: a transformers model, without peft's wrapper around it.
        longest: an upper bound on a row's tokens.
        say: is handed a sentence where layers need a mask after all.
    """
    by_device: dict[torch.device, RowStarts] = {}
    with ExitStack() as undo:
        undo.enter_context(torch._dynamo.config.patch(recompile_limit=MOST_KINDS))
        for module in model.modules():
            if not _is_attention(module):
                continue
            device = next(module.parameters()).device
            module.row_starts = by_device.setdefault(device, RowStarts(device, longest, say))
            undo.callback(delattr, module, "row_starts")
        undo.enter_context(attention_replaced(model, NAME, _attend, _takes))
        hook = model.register_forward_pre_hook(_take_row_starts(list(by_device.values())), with_kwargs=True)
        undo.callback(hook.remove)
        yield


def _is_attention(module: torch.nn.Module) -> bool:
    named = hasattr(module, "is_causal") or type(module).__name__.endswith("Attention")
    return named and next(module.parameters(), None) is not None


def _takes(module: torch.nn.Module, tokens: int, mask: Any) -> bool:
    return module.row_starts.starts is not None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    terms: AttentionTerms,
) -> torch.Tensor:
    return attend_within_rows(query, key, value, module.row_starts, terms)


def _take_row_starts(places: list[RowStarts]) -> Callable[..., Any]:
    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        starts = kwargs.pop("row_starts", None)
        for place in places:
            place.begin(starts, _tokens_of(args, kwargs))
        if starts is not None and places:
            # transformers passes a mask of four dimensions on unchanged, and so builds none of its own.
            kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=places[0].device)
        return args, kwargs

    return hook


def _tokens_of(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """Tokens of a batch, or None where it is handed over under another name."""
    ids, embeddings = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
    if ids is not None:
        return ids.numel()
    return None if embeddings is None else embeddings.shape[:-1].numel()
