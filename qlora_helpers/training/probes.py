"""Proves on the loaded model that packed rows don't attend to each other and that the fast step's losses are correct.

Short sequences of random tokens go through the model as the trainer would send them. Knows nothing of data, settings or runs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.place import at
from qlora_helpers.data.batches import AllLogits, SequenceCollator
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.model.wiring import in_eval_mode
from qlora_helpers.training.fast_step.loss import ChunkedLoss

SAME_LOSS = 0.1  # at most, of the root mean square difference of fast and plain token losses to their spread


@at("check before training")
@torch.no_grad()
def check_block_diagonal(
    model: torch.nn.Module, collator: SequenceCollator, *, leak: float = 1e-3, rounding: float = 0.1
) -> tuple[float, float]:
    """Proves on the loaded model that a row in a packed sequence gets the logits that it gets alone.

    There are two probes. Other tokens in the row before must not change a row's logits; the same sums are computed either way, so
    this is exact even in bfloat16. And the row alone must give the same logits up to rounding.

    Args:
        model: with or without adapters.
        collator: the collator of the packed data.
        leak: largest change allowed when the row before changes, as a share of the logits' spread.
        rounding: largest root mean square difference from the row alone, as the same share.

    Returns:
        The two differences found.

    Raises:
        ModelError: the rows attend to each other.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(2, vocabulary, (n,), generator=draw).tolist() for n in (9, 9, 7))
    probe = collator.for_probe(targets=AllLogits())
    device = model.get_input_embeddings().weight.device
    answers = []
    with in_eval_mode(model):
        for before in (first, other):
            ids, segments = before + second, [1] * len(before) + [2] * len(second)
            batch = probe([{"input_ids": ids, "labels": [IGNORED] * len(ids), "segment_ids": segments}])
            del batch["labels"]
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            answers.append(logits[0, len(before) :].float())
        alone = model(input_ids=torch.tensor([second], device=device)).logits[0].float()
    spread = alone.std()
    changed = float((answers[0] - answers[1]).abs().max() / spread)
    apart = float((answers[0] - alone).square().mean().sqrt() / spread)
    if not (changed <= leak and apart <= rounding):
        raise ModelError(
            "this model lets packed rows attend to each other",
            expected="a row's logits not to depend on the row before it",
            got=f"a change of {changed:.2%}, and {apart:.2%} between packed and alone",
            next_step="Set data.packing=false.",
        )
    return changed, apart


def check_same_losses(found: torch.Tensor, plain: torch.Tensor) -> float:
    """Compares the token losses of the fast and the plain path; see `probe_losses`.

    Returns:
        The root mean square difference, as a share of the losses' spread.

    Raises:
        ModelError: they differ by more than rounding.
    """
    apart = float((found - plain).square().mean().sqrt() / plain.std())
    if not apart <= SAME_LOSS:
        raise ModelError(
            "the fast step does not give this model's own losses",
            expected=f"token losses within {SAME_LOSS:.0%} of their spread",
            got=f"{apart:.2%}",
            next_step="Set train.fast_step=false.",
        )
    return apart


@at("check before training")
@torch.no_grad()
def probe_losses(model: torch.nn.Module, collator: SequenceCollator, chunked: ChunkedLoss | None) -> torch.Tensor:
    """Returns the token losses of two rows of random tokens, `(tokens,)`; they are the same on any path through the model."""
    vocabulary = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randint(2, vocabulary, (n,), generator=draw).tolist() for n in (9, 7))
    rows = [(first + second, [1] * 9 + [2] * 7)] if collator.packed else [(first, [1] * 9), (second, [1] * 7)]
    blocks = [{"input_ids": ids, "labels": ids, "segment_ids": segments} for ids, segments in rows]
    batch = collator.for_probe(targets=AllLogits() if chunked is None else collator.targets)(blocks)
    device = model.get_input_embeddings().weight.device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with in_eval_mode(model):
        if chunked is None:
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            losses = losses[labels != IGNORED]
        else:
            model(**batch)
            losses = chunked.per_token
    return losses.float()


def loss_and_gradient(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], forward: AbstractContextManager[Any] | None = None
) -> tuple[float, torch.Tensor]:
    """Returns a batch's loss and the gradient of all adapter weights as one vector, to compare two ways through a model.

    Args:
        model: with adapters.
        batch: on the model's device.
        forward: a context manager around the forward pass.
    """
    model.zero_grad(set_to_none=True)
    with forward or nullcontext():
        loss = model(**batch).loss
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])
