"""Turns packed or padded sequences into a batch of tensors: tokens, what each may attend to, and what is trained.

A `SequenceCollator` has two parts, since models read batches in several forms. `attention` keeps the rows of a batch apart:
`PaddingMask`, `BlockDiagonalMask`, `RestartedPositions`, `LayerMasks` or, for the fast step, `RowBounds`. `targets` says where the
loss is computed: `AllLogits`, `KeptLogits` or, for the fast step, `TrainedTokens`. `training.step.make_collator` chooses the parts
that fit a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_helpers.data.labels import IGNORED

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

NOTHING: Mapping[str, Any] = {"input_ids": [], "labels": [], "segment_ids": []}


@dataclass(frozen=True)
class PaddingMask:
    """Attention for one row per sequence: every token may be attended to, padding may not."""

    def tensors(self, segments: torch.Tensor) -> dict[str, Any]:
        """Returns `attention_mask`, `(batch, tokens)`."""
        return {"attention_mask": segments.clamp(max=1)}


@dataclass(frozen=True)
class BlockDiagonalMask:
    """Attention for packed rows that do not attend to each other, by positions and a four-dimensional mask.

    Args:
        dtype: None for a boolean mask (sdpa); a float type for an additive one (eager).
    """

    dtype: torch.dtype | None = None

    def tensors(self, segments: torch.Tensor) -> dict[str, Any]:
        """Returns `position_ids`, `(batch, tokens)`, and `attention_mask`, `(batch, 1, tokens, tokens)`."""
        mask = _as_mask(block_diagonal_mask(segments), self.dtype)
        return {"position_ids": positions_in_row(segments), "attention_mask": mask}


@dataclass(frozen=True)
class RestartedPositions:
    """Attention for packed rows that do not attend to each other, by positions alone.

    From positions that restart, transformers builds the mask of each kind of layer, sliding windows included; a mask of ours would
    take their place.

    Args:
        with_state: whether the model's recurrent layers are told where rows start (`row_state`).
    """

    with_state: bool = False

    def tensors(self, segments: torch.Tensor) -> dict[str, Any]:
        """Returns `position_ids`, `(batch, tokens)`, and where asked for the tensors of `row_state`."""
        return {"position_ids": positions_in_row(segments)} | (row_state(segments) if self.with_state else {})


@dataclass(frozen=True)
class LayerMasks:
    """Attention for packed rows that do not attend to each other, by positions and one mask for each kind of layer.

    For models with sliding windows that build no masks from positions (gpt-oss).

    Args:
        window: tokens that a token of a sliding layer sees, itself included.
        dtype: as for `BlockDiagonalMask`.
    """

    window: int
    dtype: torch.dtype | None = None

    def tensors(self, segments: torch.Tensor) -> dict[str, Any]:
        """Returns `position_ids`, `(batch, tokens)`, and `attention_mask`, `(batch, 1, tokens, tokens)` for each kind of layer."""
        whole = block_diagonal_mask(segments)
        masks = {"full_attention": whole, "sliding_attention": whole.triu(1 - self.window)}
        return {
            "position_ids": positions_in_row(segments),
            "attention_mask": {kind: _as_mask(mask, self.dtype) for kind, mask in masks.items()},
        }


@dataclass(frozen=True)
class RowBounds:
    """Attention for packed rows that do not attend to each other, by where rows start (`fast_step.block_diagonal`).

    Args:
        most_rows: rows in the fullest sequence, padding counted as one (`most_rows`).
        with_state: whether the model's recurrent layers are told where rows start (`row_state`).
    """

    most_rows: int
    with_state: bool = False

    def tensors(self, segments: torch.Tensor) -> dict[str, Any]:
        """Returns `position_ids`, `(batch, tokens)`, and `row_starts`, `(batch * most_rows + 1,)`."""
        state = row_state(segments) if self.with_state else {}
        return {
            "position_ids": positions_in_row(segments),
            "row_starts": row_starts(segments, self.most_rows),
        } | state


@dataclass(frozen=True)
class AllLogits:
    """The model computes logits at every position, and its loss from `labels`."""

    def tensors(self, shifted: torch.Tensor) -> dict[str, Any]:
        """Returns nothing: `labels` are in every batch."""
        return {}


@dataclass(frozen=True)
class KeptLogits:
    """The model computes logits only where the next token is trained, for a `forward` that takes `logits_to_keep`.

    The loss and the gradients are the same, at a fraction of the output layer's work.

    Args:
        as_list: give the positions as a list. With a model's layers on several GPUs, accelerate would bring a tensor to the
            first GPU, and the last layer's output is on the last.
    """

    as_list: bool = False

    def tensors(self, shifted: torch.Tensor) -> dict[str, Any]:
        """Returns `logits_to_keep`, `(kept,)`, and `shift_labels`, `(batch, kept)`."""
        kept = (shifted != IGNORED).any(dim=0).nonzero().squeeze(-1)
        positions = kept.tolist() if self.as_list else kept
        return {"logits_to_keep": positions, "shift_labels": shifted[:, kept].contiguous()}


@dataclass(frozen=True)
class TrainedTokens:
    """Flat lists of what is trained, for the loss in chunks (`fast_step.loss`).

    Args:
        fill_to: fills the lists up to this length with positions that are not trained, so that they have one length in all
            batches: the trained tokens of the fullest batch (`most_trained`). None doesn't fill them.
    """

    fill_to: int | None = None

    def tensors(self, shifted: torch.Tensor) -> dict[str, Any]:
        """Returns `trained_index` and `trained_labels`, `(trained,)` each; an index counts over the flattened batch."""
        import torch

        flat = shifted.flatten()
        index = (flat != IGNORED).nonzero().squeeze(-1)
        if (missing := (self.fill_to or 0) - len(index)) > 0:
            index = torch.cat([index, (flat == IGNORED).nonzero().squeeze(-1)[:missing]])
        return {"trained_index": index, "trained_labels": flat[index]}


Attention = PaddingMask | BlockDiagonalMask | RestartedPositions | LayerMasks | RowBounds
Targets = AllLogits | KeptLogits | TrainedTokens


@dataclass(frozen=True)
class HostTokens:
    """A batch's tokens, which stay on the host wherever the rest of the batch goes.

    Attributes:
        ids: `(batch, tokens)`, int64, equal to the batch's `input_ids`.
    """

    ids: torch.Tensor

    def to(self, *args: Any, **kwargs: Any) -> HostTokens:
        """Returns itself: whatever moves a batch calls this on each of its parts."""
        return self


@dataclass(frozen=True)
class SequenceCollator:
    """Turns sequences into one batch of tensors.

    Args:
        pad_token_id: fills up short sequences; it is never trained, and no row attends to it.
        attention: how rows are kept apart.
        targets: where the loss is computed.
        length: tokens of a sequence; None takes the longest sequence in the batch, and so does a longer one.
        sequences: fills up every batch to so many sequences, so that all batches have one shape; None doesn't.
        host_tokens: whether to add `host_tokens`, the tokens that stay on the host (`model.host_embedding`).
    """

    pad_token_id: int
    attention: Attention
    targets: Targets = AllLogits()
    length: int | None = None
    sequences: int | None = None
    host_tokens: bool = False

    @property
    def packed(self) -> bool:
        """Whether a sequence may hold several rows."""
        return not isinstance(self.attention, PaddingMask)

    def for_probe(self, *, targets: Targets) -> SequenceCollator:
        """The collator of a few short sequences that go through the model as the others do, without filling up batches."""
        return dataclasses.replace(self, targets=targets, length=None, sequences=None)

    def __call__(self, sequences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns `input_ids` and `labels`, `(batch, tokens)` each, and the tensors of `attention` and `targets`.

        Sequences that carry their number (`packing.NumberedSequences`) also give `sequences`, `(sequences,)`.
        """
        import torch

        rows = [*sequences, *[NOTHING] * max(0, (self.sequences or 0) - len(sequences))]
        length = max(self.length or 0, *(len(row["input_ids"]) for row in rows))
        ids = _padded([row["input_ids"] for row in rows], length, self.pad_token_id)
        labels = _padded([row["labels"] for row in rows], length, IGNORED)
        segments = _padded([row["segment_ids"] for row in rows], length, 0)
        shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        batch = {"input_ids": ids, "labels": labels}
        batch |= self.attention.tensors(segments) | self.targets.tensors(shifted)
        if self.host_tokens:
            batch["host_tokens"] = HostTokens(ids)
        numbers = [row["sequence"] for row in sequences if "sequence" in row]
        if numbers:
            batch["sequences"] = torch.tensor(numbers)
        return batch


def most_rows(*sets: Dataset) -> int:
    """Rows in the fullest sequence, the padding at its end counted as one."""
    return 1 + max(max(map(len, sequences["row_ids"]), default=0) for sequences in sets)


def most_trained(train: Dataset, sequences: int) -> int:
    """Trained tokens of the fullest batch of so many sequences that could come together.

    A sequence's first token is not counted: nothing predicts it.
    """
    import numpy as np

    labels = train.with_format("arrow")[:].column("labels").combine_chunks()
    trained, starts = labels.flatten().to_numpy() != IGNORED, labels.offsets.to_numpy()[:-1] - labels.offsets[0].as_py()
    trained[starts] = False
    counts = np.add.reduceat(trained, starts, dtype=int)
    return int(np.sort(counts)[::-1][:sequences].sum())


def row_starts(segments: torch.Tensor, most_rows: int) -> torch.Tensor:
    """Where rows start in a flattened batch, always as many numbers: what attention within rows needs in place of a mask.

    Args:
        segments: `(batch, tokens)`, the row's number at each token; padding is 0 and counts as a row of its own.
        most_rows: rows in the fullest sequence, padding counted as one.

    Returns:
        `(batch * most_rows + 1,)`, int32; places after the last start hold the number of tokens.
    """
    import torch

    batch, tokens = segments.shape
    found = _begins(segments).flatten().nonzero().squeeze(1)
    starts = torch.full((batch * most_rows + 1,), batch * tokens, dtype=torch.int32)
    starts[: len(found)] = found.to(torch.int32)
    return starts


def row_state(segments: torch.Tensor) -> dict[str, Any]:
    """Where rows start, in the forms that kernels of recurrent layers take (Mamba 2, gated delta rule, short convolutions).

    Args:
        segments: `(batch, tokens)`, the row's number at each token; padding is 0 and counts as a row of its own.

    Returns:
        `seq_idx`, `(batch, tokens)`, int32, and for a batch of one sequence, as those kernels require, `cu_seq_lens_q` and
        `cu_seq_lens_k`, `(rows + 1,)`, int32.
    """
    import torch

    begins = _begins(segments)
    found = {"seq_idx": (begins.cumsum(dim=1) - 1).to(torch.int32)}
    if len(segments) == 1:
        starts = torch.cat([begins[0].nonzero().squeeze(1), torch.tensor([segments.shape[1]])]).to(torch.int32)
        found |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    return found


def positions_in_row(segments: torch.Tensor) -> torch.Tensor:
    """Positions that restart at 0 with every row.

    Args:
        segments: `(batch, tokens)`, the row's number at each token; the tokens of a row follow each other.
    """
    import torch

    index = torch.arange(segments.shape[1]).expand_as(segments)
    return index - torch.where(_begins(segments), index, 0).cummax(dim=1).values


def block_diagonal_mask(segments: torch.Tensor) -> torch.Tensor:
    """True where token i may attend to token j, `(batch, tokens)` -> `(batch, 1, tokens, tokens)`: the same row, and not later.

    Padding attends to padding, so that no line of the softmax is empty.
    """
    import torch
    from einops import rearrange

    same_row = rearrange(segments, "batch i -> batch 1 i 1") == rearrange(segments, "batch j -> batch 1 1 j")
    return same_row & torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()


def _begins(segments: torch.Tensor) -> torch.Tensor:
    """True at the first token of each row, `(batch, tokens)`."""
    import torch

    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return begins


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    import torch

    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def _as_mask(allowed: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    import torch

    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
