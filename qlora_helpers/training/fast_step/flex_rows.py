"""Attention within packed rows for what the variable-length kernel refuses: soft-capped scores, and heads wider than 256 values.

On a GPU, PyTorch's flex attention (Dong et al. 2024, arXiv:2412.05496) computes it in one compiled kernel that holds no scores and
skips blocks of 128 tokens that do not see each other. Which blocks do is computed from where rows start, once a batch and window,
by a few sums that wait for nothing, so that a CUDA graph can hold them. Whether the kernel runs with heads of a given kind is found
by running it forward and backward, with smaller tiles where larger ones need more shared memory than the GPU has. Where no tiles
fit, the layer attends under a mask, as on the plain path. Knows nothing of models.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from qlora_helpers.model.attention import AttentionTerms

BLOCK = 128  # tokens in a block of the mask; the kernel's tiles divide it
_TILES = {
    "FORCE_USE_FLEX_ATTENTION": True
}  # else short sequences take a kernel for decoding, which has no backward pass
Options = dict[str, Any]
log = logging.getLogger(__name__)


class RowMask(NamedTuple):
    """What a token of a batch sees.

    Attributes:
        blocks: flex attention's `BlockMask`.
        first: the first token that each token sees, `(tokens,)`, int32; it sees all from there to itself.
    """

    blocks: Any
    first: torch.Tensor


class RowMasks:
    """The masks of the current batch, and how each kind of head attends; shared by all layers on one device.

    Args:
        say: is handed a sentence, once for each kind of head that flex attention can't compute.

    Attributes:
        masks: the mask for each window that a layer asked for; None stands for no window.
        how: the kernel's options for each kind of head, or why the kernel can't be used.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._starts: Any = None
        self._tokens = 0
        self._windows: dict[int | None, None] = {}
        self.masks: dict[int | None, RowMask] = {}
        self.how: dict[tuple[Any, ...], Options | str] = {}

    def begin(self, starts: torch.Tensor | None, tokens: int | None) -> None:
        """Takes a new batch: where rows start, `(rows + 1,)`, and its number of tokens, or None where that is not known yet.

        All windows that were ever asked for get their mask here. A layer that asked for one while it recomputes would save other
        tensors than in its forward pass.
        """
        self._starts = starts
        if starts is None or tokens is None:
            self.masks = {}
            return
        self._tokens = tokens
        self.masks = {window: row_mask(starts, tokens, window) for window in self._windows}

    @torch.compiler.disable
    def mask(self, window: int | None, tokens: int) -> RowMask:
        """Returns the batch's mask for a window, which later batches get beforehand."""
        if window not in self.masks or self._tokens != tokens:
            self._tokens = tokens
            self._windows[window] = None
            self.masks[window] = row_mask(self._starts, tokens, window)
        return self.masks[window]

    @torch.compiler.disable
    def find_out(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, terms: AttentionTerms
    ) -> Options | str:
        """Finds out how heads of this kind attend, and says so where they can't by flex attention."""
        found = options_that_run(query, key, value, mask, terms)
        if isinstance(found, str):
            self._say(
                f"heads of {query.shape[-1]} values attend under a mask in layers that flex attention can't compute here ({found})"
            )
        self.how[kind_of(query, key, terms)] = found
        return found


def attend_by_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: RowMasks,
    terms: AttentionTerms,
    window: int | None,
    batch: int,
) -> torch.Tensor:
    """Computes causal attention within rows on a GPU, by flex attention or, where that can't be used, under a mask.

    Args:
        query: `(tokens, heads, head_dim)`, the flattened batch.
        key, value: `(tokens, kv_heads, head_dim)`.
        masks: of this batch.
        terms: scale, soft-cap and sinks.
        window: tokens that a token sees, itself included; None for all before it in its row.
        batch: sequences in the batch.

    Returns:
        `(tokens, heads, head_dim)`.
    """
    mask = masks.masks.get(window)
    if mask is None or len(mask.first) != len(query):
        mask = masks.mask(window, len(query))
    how = masks.how.get(kind_of(query, key, terms))
    if how is None:
        how = masks.find_out(query, key, value, mask.blocks, terms)
    if isinstance(how, str):
        return attend_under_mask(query, key, value, mask.first, terms, batch)
    attend = flex_attend if torch.compiler.is_compiling() else compiled_flex_attend()
    query, key, value = (rearrange(part, "tokens heads dim -> 1 heads tokens dim") for part in (query, key, value))
    out = attend(query, key, value, mask.blocks, terms, how)
    return rearrange(out, "1 heads tokens dim -> tokens heads dim").contiguous()


def kind_of(query: torch.Tensor, key: torch.Tensor, terms: AttentionTerms) -> tuple[Any, ...]:
    """What the kernel is compiled for, beside the number of tokens."""
    return query.shape[1], key.shape[1], query.shape[2], query.dtype, terms.softcap, terms.sinks is not None


def flex_attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, terms: AttentionTerms, options: Options
) -> torch.Tensor:
    """Calls flex attention on `(1, heads, tokens, head_dim)` each. Must be compiled: uncompiled, it holds all scores."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    softcap = terms.softcap

    def capped(score: Any, batch: Any, head: Any, at: Any, seen: Any) -> Any:
        return softcap * torch.tanh(score / softcap)

    out = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=terms.scale,
        enable_gqa=key.shape[1] != query.shape[1],
        kernel_options=options,
        return_aux=None if terms.sinks is None else AuxRequest(lse=True),
    )
    if terms.sinks is not None:  # one more place in each softmax, of a fixed score and no value
        out, aux = out
        out = (out * torch.sigmoid(aux.lse - terms.sinks.to(aux.lse.dtype)[:, None]).unsqueeze(-1)).to(query.dtype)
    return out


@functools.cache
def compiled_flex_attend() -> Callable[..., torch.Tensor]:
    """Compiles `flex_attend`, for each shape anew. Fails rather than run uncompiled."""
    return torch.compile(flex_attend, dynamic=False, fullgraph=True)


def candidates(head_dim: int) -> list[Options]:
    """The kernel's options to try for heads of so many values, the fastest first."""
    smaller = [_tiles(32, 32, 32, 2, 4), _tiles(16, 16, 16, 1, 4)]
    if head_dim <= 256:
        return [dict(_TILES), *smaller]
    return [_tiles(64, 32, 32, 1, 8), *smaller]


def _tiles(queries: int, keys: int, backward: int, stages: int, warps: int) -> Options:
    """Options for tiles of so many tokens; the backward pass, which holds twice as much, never loads ahead."""
    sizes = {f"bwd_BLOCK_{name}": backward for name in ("M1", "N1", "M2", "N2")}
    more = {"fwd_num_stages": stages, "fwd_num_warps": warps, "bwd_num_stages": 1, "bwd_num_warps": warps}
    return {**_TILES, "fwd_BLOCK_M": queries, "fwd_BLOCK_N": keys, **sizes, **more}


def options_that_run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, terms: AttentionTerms
) -> Options | str:
    """Returns the first options with which the kernel runs forward and backward on tensors like these, or why none does.

    Raises:
        torch.OutOfMemoryError: there is no room for a pass.
    """
    why = ""
    for options in candidates(query.shape[-1]):
        try:
            with torch.inference_mode(False), torch.enable_grad():
                parts = [torch.zeros_like(part).requires_grad_() for part in (query, key, value)]
                parts_4d = [rearrange(part, "tokens heads dim -> 1 heads tokens dim") for part in parts]
                compiled_flex_attend()(*parts_4d, mask, terms, options).sum().backward()
                if query.is_cuda:
                    torch.cuda.synchronize(query.device)
            return options
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of dynamo, of inductor, of triton: no common kind
            log.info("flex attention does not run with %s: %s", options, error)
            why = why or _in_a_line(error)
    return why


def _in_a_line(error: BaseException) -> str:
    """The first line of what an error was raised from: compilers wrap errors into their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


# masks


def first_and_last(starts: torch.Tensor, tokens: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token that each token sees, and the last one that sees it, `(tokens,)` each, int32; both never fall.

    Args:
        starts: `(rows + 1,)`, int32, as in `RowStarts`.
        tokens: in the flattened batch.
        window: tokens that a token sees, itself included; None for all before it in its row.
    """
    place = torch.arange(tokens, device=starts.device, dtype=torch.int32)
    row = torch.searchsorted(starts, place, right=True)
    first, last = starts[row - 1], starts[row] - 1
    if window is not None:
        first, last = torch.maximum(first, place - (window - 1)), torch.minimum(last, place + (window - 1))
    return first, last


def row_mask(starts: torch.Tensor, tokens: int, window: int | None) -> RowMask:
    """Makes flex attention's mask for packed rows; arguments as for `first_and_last`. Nothing waits for the GPU.

    A token sees all tokens from the first one that it sees to itself, and the first one never falls from a token to the next. So a
    block of queries sees one range of blocks, of which all but both ends are seen whole by all of its queries.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first, last = first_and_last(starts, tokens, window)
    count = -(-tokens // BLOCK)
    block = torch.arange(count, device=starts.device, dtype=torch.int32)
    begins, ends = block * BLOCK, (block * BLOCK + BLOCK - 1).clamp(max=tokens - 1)
    seen_from = first[begins] // BLOCK
    whole_from = ((first[ends] + BLOCK - 1) // BLOCK).minimum(block)
    whole_from = torch.where(begins + BLOCK <= tokens, whole_from, block)  # the last block may be cut short
    seen_to = last[ends] // BLOCK
    whole_to = ((last[begins] + 1) // BLOCK - 1).maximum(block)
    nth = block[None]
    in_part = whole_from - seen_from + 1
    keys_in_part = torch.where(nth < in_part[:, None] - 1, seen_from[:, None] + nth, block[:, None])
    queries_in_part = torch.where(nth == 0, block[:, None], whole_to[:, None] + nth)

    def numbers(found: torch.Tensor) -> torch.Tensor:
        return found.clamp(max=count - 1).to(torch.int32)[None, None].contiguous()

    def counts(found: torch.Tensor) -> torch.Tensor:
        return found.to(torch.int32)[None, None].contiguous()

    blocks = BlockMask(
        seq_lengths=(tokens, tokens),
        kv_num_blocks=counts(in_part),
        kv_indices=numbers(keys_in_part),
        full_kv_num_blocks=counts(block - whole_from),
        full_kv_indices=numbers(whole_from[:, None] + nth),
        q_num_blocks=counts(seen_to - whole_to + 1),
        q_indices=numbers(queries_in_part),
        full_q_num_blocks=counts(whole_to - block),
        full_q_indices=numbers(block[:, None] + 1 + nth),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_sees(first),
    )
    return RowMask(blocks, first)


def _sees(first: torch.Tensor) -> Any:
    """Makes flex attention's function for the blocks that are seen in part."""

    def sees(batch: Any, head: Any, at: Any, seen: Any) -> Any:
        return (seen <= at) & (seen >= first[at])

    return sees


def attend_under_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: torch.Tensor, terms: AttentionTerms, batch: int
) -> torch.Tensor:
    """Computes what `attend_by_flex` does, holding a mask and, where scores are changed, all scores.

    Args:
        query, key, value, terms, batch: as there.
        first: the first token that each token sees, `(tokens,)`, from `first_and_last`.
    """
    length = query.shape[0] // batch
    place = torch.arange(length, device=query.device)
    begins = torch.arange(batch, device=query.device)[:, None] * length
    first = rearrange(first, "(batch length) -> batch length", batch=batch) - begins
    seen = (place <= place[:, None]) & (place >= rearrange(first, "batch length -> batch 1 length 1"))
    group = query.shape[1] // key.shape[1]
    query = rearrange(query, "(batch length) heads dim -> batch heads length dim", batch=batch)
    key, value = (
        repeat(part, "(batch length) heads dim -> batch (heads group) length dim", batch=batch, group=group)
        for part in (key, value)
    )
    out = attend_where_seen(query, key, value, seen, terms)
    return rearrange(out, "batch heads length dim -> (batch length) heads dim").contiguous()


def attend_where_seen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, terms: AttentionTerms
) -> torch.Tensor:
    """Attention under a mask, True where a query sees a key; `(batch, heads, tokens, head_dim)` each."""
    if terms.softcap is None and terms.sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=terms.scale)
    tokens = query.shape[2]
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if terms.scale is None else terms.scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if terms.softcap is not None:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if terms.sinks is not None:
        sinks = repeat(terms.sinks.to(scores.dtype), "heads -> b heads tokens 1", b=query.shape[0], tokens=tokens)
        scores = torch.cat([scores, sinks], dim=-1)
    return scores.softmax(-1)[..., :tokens].to(value.dtype) @ value
