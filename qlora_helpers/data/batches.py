"""Packed or padded sequences become batches of tensors, with positions, masks and what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.data.labels import IGNORED

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


@dataclass(frozen=True)
class HostTokens:
    """A batch's tokens, which stay on the host wherever the rest of the batch goes.

    Attributes:
        ids: `(batch, tokens)`, int64, equal to the batch's `input_ids`.
    """

    ids: torch.Tensor

    def to(self, *args: Any, **kwargs: Any) -> HostTokens:
        """Itself: what moves batches asks each part of them."""
        return self


@dataclass
class SequenceCollator:
    """Blocks -> one batch of tensors.

    Padded rows get a two-dimensional mask. Packed blocks get positions that restart with every row and a block-diagonal causal
    mask, so no row sees another. Where the model's `forward` takes `logits_to_keep`, logits are computed at the positions whose
    next token is trained, and nowhere else: same loss and gradients, a fraction of the output layer's work.

    Args:
        pad_token_id: fills up short blocks; never trained, never attended to by a row.
        packed: whether blocks hold several rows.
        mask_dtype: None for a boolean mask (sdpa); a float type for an additive one (eager).
        pad_to: length of a packed batch; None pads to the longest block in it.
        keep_trained_logits: whether to add `logits_to_keep` and `shift_labels`.
        plain_positions: whether `logits_to_keep` is a list: with a model's layers on several GPUs, accelerate would bring a tensor
            to the first, and the last layer's output is on the last.
        most_rows: rows in any block, padding counted as one; given, a packed batch carries `row_starts` in place of a mask
            (`fast_step.rows`).
        list_trained: whether to add `trained_index` and `trained_labels`, flat lists of what is trained, in place of
            `logits_to_keep` and `shift_labels` (`fast_step.loss`).
        most_trained: trained tokens in any batch; given, the lists of `list_trained` are filled up to it with positions that are
            not trained, so that they have one length in all batches.
        blocks: fills up a batch with blocks of padding to this number, so that all batches have one shape; None doesn't.
        host_tokens: whether to add `host_tokens`, the tokens that stay on the host (`fast_step.embeddings`).
    """

    pad_token_id: int
    packed: bool
    mask_dtype: torch.dtype | None = None
    pad_to: int | None = None
    keep_trained_logits: bool = True
    plain_positions: bool = False
    most_rows: int | None = None
    list_trained: bool = False
    most_trained: int | None = None
    blocks: int | None = None
    host_tokens: bool = False

    def __call__(self, blocks: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `labels`, `attention_mask` and, for packed blocks, `position_ids`: `(batch, tokens)` each, the
        packed mask `(batch, 1, tokens, tokens)`, or in its place `row_starts`, `(batch * most_rows + 1,)`."""
        import torch

        missing = max(0, (self.blocks or 0) - len(blocks))
        blocks = [*blocks, *[{"input_ids": [], "labels": [], "segment_ids": []}] * missing]
        length = max(self.pad_to or 0, *(len(block["input_ids"]) for block in blocks))
        ids = _padded([block["input_ids"] for block in blocks], length, self.pad_token_id)
        labels = _padded([block["labels"] for block in blocks], length, IGNORED)
        segments = _padded([block["segment_ids"] for block in blocks], length, 0)
        batch = {"input_ids": ids, "labels": labels}
        if self.host_tokens:
            batch["host_tokens"] = HostTokens(ids)
        if self.packed:
            batch["position_ids"] = positions_in_row(segments)
            if self.most_rows is None:
                batch["attention_mask"] = _as_mask(block_diagonal_mask(segments), self.mask_dtype)
            else:
                batch["row_starts"] = row_starts(segments, self.most_rows)
        else:
            batch["attention_mask"] = segments.clamp(max=1)
        shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        if self.list_trained:
            flat = shifted.flatten()
            index = (flat != IGNORED).nonzero().squeeze(-1)
            if (missing := (self.most_trained or 0) - len(index)) > 0:
                index = torch.cat([index, (flat == IGNORED).nonzero().squeeze(-1)[:missing]])
            batch["trained_index"], batch["trained_labels"] = index, flat[index]
        elif self.keep_trained_logits:
            kept = (shifted != IGNORED).any(dim=0).nonzero().squeeze(-1)
            batch["logits_to_keep"] = kept.tolist() if self.plain_positions else kept
            batch["shift_labels"] = shifted[:, kept].contiguous()
        numbers = [block["block"] for block in blocks if "block" in block]
        if numbers:
            batch["blocks"] = torch.tensor(numbers)
        return batch


def most_rows(*sets: Dataset) -> int:
    """Rows in the fullest block, the padding at its end counted as one."""
    return 1 + max(max(map(len, blocks["row_ids"]), default=0) for blocks in sets)


def most_trained(train: Dataset, blocks: int) -> int:
    """Trained tokens of the fullest batch of so many blocks that could come together; a block's first token has no predecessor."""
    import numpy as np

    labels = train.with_format("arrow")[:].column("labels").combine_chunks()
    trained, starts = labels.flatten().to_numpy() != IGNORED, labels.offsets.to_numpy()[:-1] - labels.offsets[0].as_py()
    trained[starts] = False
    counts = np.add.reduceat(trained, starts, dtype=int)
    return int(np.sort(counts)[::-1][:blocks].sum())


def row_starts(segments: torch.Tensor, most_rows: int) -> torch.Tensor:
    """Where rows start in a flattened batch, always equally many numbers: what attention within rows needs in place of a mask.

    Args:
        segments: `(batch, tokens)`, the row's number at each token; padding is 0 and counts as a row of its own.
        most_rows: rows in any block, padding counted.

    Returns:
        `(batch * most_rows + 1,)`, int32; after the last start, the number of tokens as often as it takes.
    """
    import torch

    batch, tokens = segments.shape
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    found = begins.flatten().nonzero().squeeze(1)
    starts = torch.full((batch * most_rows + 1,), batch * tokens, dtype=torch.int32)
    starts[: len(found)] = found.to(torch.int32)
    return starts


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    import torch

    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def positions_in_row(segments: torch.Tensor) -> torch.Tensor:
    """Positions that restart at 0 with every row.

    Args:
        segments: `(batch, tokens)`, the row's number at each token; a row's tokens stand together.
    """
    import torch

    index = torch.arange(segments.shape[1]).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def block_diagonal_mask(segments: torch.Tensor) -> torch.Tensor:
    """True where token i may look at token j: the same row, and not later. `(batch, tokens)` -> `(batch, 1, tokens, tokens)`.

    Padding looks at padding, so that no line of the softmax is empty.
    """
    import torch
    from einops import rearrange

    same_row = rearrange(segments, "batch i -> batch 1 i 1") == rearrange(segments, "batch j -> batch 1 1 j")
    return same_row & torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()


def _as_mask(allowed: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    import torch

    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
