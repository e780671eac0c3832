"""Proves on the loaded model that the fast step's losses are the model's own.

Short sequences of random tokens go through the model as the trainer would send them. Knows nothing of data, settings or runs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.place import at
from qlora_helpers.data.batches import AllLogits, SequenceCollator
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.model.wiring import in_eval_mode
from qlora_helpers.training.fast_step.loss import ChunkedLoss
from qlora_helpers.training.proving import ROUNDINGS, random_rows

STANDARD_ERRORS = 5  # of a mean difference that is not a rounding


def check_same_losses(found: torch.Tensor, plain: torch.Tensor, rounded: torch.Tensor) -> float:
    """Compares the token losses of the fast and the plain path; see `probe_losses`.

    Roundings differ from token to token. So neither may the losses lie further apart than rounding explains, nor may they be larger
    or smaller on average, as those of a model whose soft-cap is left out are.

    Args:
        found, plain: losses of the same tokens on the two paths, `(tokens,)` each.
        rounded: on the plain path, with values rounded anew (`proving.values_rounded_anew`).

    Returns:
        The root mean square difference, in nats.

    Raises:
        ModelError: they differ by more than rounding.
    """
    difference = found - plain
    apart, mean = float(difference.square().mean().sqrt()), abs(float(difference.mean()))
    in_float32 = 4 * torch.finfo(torch.float32).eps * float(plain.abs().max())  # in which the chunks are summed
    rounding = max(float((rounded - plain).square().mean().sqrt()), in_float32)
    by_chance = max(rounding / 4, STANDARD_ERRORS * float(difference.std()) / len(difference) ** 0.5)
    if not (apart <= ROUNDINGS * rounding and mean <= by_chance):
        raise ModelError(
            "the fast step does not give this model's own losses",
            expected=f"token losses that differ by at most {ROUNDINGS * rounding:.2g} nats, as rounding explains, and by "
            f"{by_chance:.2g} on average",
            got=f"{apart:.2g}, and {mean:.2g} on average",
            next_step="Set train.fast_step=false.",
        )
    return apart


@at("check before training")
@torch.no_grad()
def probe_losses(model: torch.nn.Module, collator: SequenceCollator, chunked: ChunkedLoss | None) -> torch.Tensor:
    """Returns the token losses of two rows of random tokens, `(tokens,)`; they are the same on any path through the model."""
    first, second = random_rows(model, 37, 29)
    rows = [(first, [1] * len(first)), (second, [1] * len(second))]
    if collator.packed:
        rows = [(first + second, [1] * len(first) + [2] * len(second))]
    blocks = [{"input_ids": ids, "labels": ids, "segment_ids": segments} for ids, segments in rows]
    batch = collator.for_probe(targets=AllLogits() if chunked is None else collator.targets)(blocks)
    device = model.get_input_embeddings().weight.device
    batch = send_to_device(batch, device)
    with in_eval_mode(model):
        if chunked is None:
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch).logits[:, :-1].float().flatten(0, 1)
            # On a CPU a softmax over a dimension that is not the last one is too large or small by 5e-5 at 49,152 tokens.
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
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
