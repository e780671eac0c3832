"""Computes the loss of a frozen output layer a few tokens at a time.

A vocabulary of 128,256 makes half a MiB of float32 logits per token. The output layer is frozen, so training needs only its
input's gradient: loss and gradient are computed chunk by chunk in the forward pass, and no chunk's logits outlive it. The matrix
multiplications are those of the plain path, each done once. (Liger Kernel, arXiv:2410.10989, fuses the output layer with the loss.)

What a model does with its logits after the output layer is read off the model: nothing, a multiplication (Cohere, Granite), or a
soft-cap (Gemma 2 and 4), and the same is done to each chunk. Anything else keeps the model's own loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qlora_helpers.base.place import at
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.model.patching import replace_forward
from qlora_helpers.model.wiring import in_eval_mode
from qlora_helpers.planning.memory import loss_chunk
from qlora_helpers.training.proving import NotProvedError, random_rows, why_it_fails


@dataclass(frozen=True)
class LogitChange:
    """What a model does with its logits after the output layer.

    Attributes:
        scale: factor of the logits.
        cap: bounds them to `cap * tanh(logits / cap)`; None doesn't.
    """

    scale: float = 1.0
    cap: float | None = None


class _TokenLosses(torch.autograd.Function):
    """Maps `(tokens, hidden)` to `(tokens,)` losses, and keeps the gradient of each token's loss instead of its logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        cap: float | None,
        chunk: int,
    ) -> torch.Tensor:
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight, bias).float()
            tangent = None if cap is None else logits.div_(cap).tanh_()
            if tangent is not None:
                logits = tangent * cap
            trained = labels[part] != IGNORED
            target = labels[part].clamp(min=0).unsqueeze(1)
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            losses[part] = ((log_sum - logits.gather(1, target)).squeeze(1)) * trained
            if gradients is not None:
                slopes = logits.sub_(log_sum).exp_()
                slopes.scatter_add_(1, target, torch.full_like(target, -1, dtype=slopes.dtype))
                if tangent is not None:
                    slopes.mul_(tangent.square_().neg_().add_(1))
                gradients[part] = slopes.mul_(trained.unsqueeze(1)).to(weight.dtype) @ weight
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return gradients * upstream.unsqueeze(1).to(gradients.dtype), None, None, None, None, None


def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    cap: float | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Computes each token's cross-entropy under a frozen output layer, in nats; 0 where the label is ignored.

    Args:
        hidden: `(tokens, hidden)`, the output layer's input.
        weight: `(vocabulary, hidden)`; gets no gradient.
        labels: `(tokens,)`, the next token at each position, or -100.
        bias: `(vocabulary,)` or None.
        cap: bounds the logits to `cap * tanh(logits / cap)`; None doesn't.
        chunk: how many tokens' logits exist at once; None keeps them within 128 MiB.

    Returns:
        `(tokens,)`, float32.
    """
    return _TokenLosses.apply(hidden, weight, bias, labels, cap, chunk or loss_chunk(weight.shape[0]))


class ChunkedLoss:
    """A model's `loss_function` that takes the output layer's input instead of its logits, for trained tokens only.

    Attributes:
        trained: flat index of the tokens whose successor is trained, `(trained,)`, and these successors, `(trained,)`; None where
            the batch does not list them.
        hidden: the output layer's input, `(batch, tokens, hidden)`, between the output layer and the loss.
        change: what the model does with its logits.
        per_token: losses of the last call, `(trained,)`, without gradient; an evaluation weights them by tokens.
    """

    def __init__(self, head: torch.nn.Module, change: LogitChange) -> None:
        self.head, self.change = head, change
        self.hidden: torch.Tensor | None = None
        self.trained: tuple[torch.Tensor, torch.Tensor] | None = None
        self.per_token: Any = None

    @at("loss")
    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Returns the mean over trained tokens, or their sum over `num_items_in_batch`; takes transformers' arguments.

        `logits` are the stand-in that `loss_in_chunks` lets the model handle in their place.
        """
        if self.hidden is None:
            raise NotProvedError("the model computes its loss without its output layer: its own loss is used")
        hidden, self.hidden = self.hidden.flatten(0, -2), None
        if self.trained is None:
            target = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].flatten()
        else:
            index, target = self.trained
            hidden = hidden[index.to(hidden.device)]
        weight, bias = self.head.weight, self.head.bias
        target = target.to(weight.device)
        if self.change.scale != 1:
            hidden = hidden * self.change.scale
            bias = None if bias is None else bias * self.change.scale
        losses = token_losses(hidden.to(weight), weight, target, bias=bias, cap=self.change.cap)
        self.per_token = losses.detach()
        if num_items_in_batch is None:
            return losses.sum() / (target != IGNORED).sum()
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(losses.device)
        return losses.sum() / num_items_in_batch


def chunked_row_losses(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], chunked: ChunkedLoss
) -> tuple[torch.Tensor, torch.Tensor]:
    """Does what `model.wiring.row_losses` does, for a model that computes its loss in chunks and so returns no logits.

    Args:
        model: with `loss_in_chunks` open on it.
        batch: what `SequenceCollator` made with `list_trained`.
        chunked: the loss that `loss_in_chunks` yielded.

    Returns:
        The sums in nats and the numbers of trained tokens, `(batch,)` each.
    """
    model(**batch)
    rows, tokens = batch["input_ids"].shape
    of_row = torch.zeros(2, rows, device=chunked.per_token.device)
    index = (batch["trained_index"] // tokens).to(of_row.device)
    trained = batch["trained_labels"].to(of_row.device) != IGNORED
    of_row[0].index_add_(0, index, chunked.per_token)
    of_row[1].index_add_(0, index, trained.to(of_row.dtype))
    return of_row[0], of_row[1].long()


@contextmanager
def loss_in_chunks(model: torch.nn.Module) -> Iterator[ChunkedLoss]:
    """While open, a causal language model that is given labels computes no logits, and its loss chunk by chunk.

    The model then also takes `trained_index` and `trained_labels` (`data.batches.SequenceCollator`). Without labels it returns
    logits as before. The call still goes through the root module, so the hooks of peft, accelerate and DDP run.

    Args:
        model: a transformers model, without peft's wrapper around it; `chunked_loss_refusal` gives None for it.
    """
    head = model.get_output_embeddings()
    loss = ChunkedLoss(head, logit_change(model) or LogitChange())
    logits_of, before = head.forward, model.loss_function
    with_labels = False

    def look(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        nonlocal with_labels
        with_labels = kwargs.get("labels") is not None
        index, target = kwargs.pop("trained_index", None), kwargs.pop("trained_labels", None)
        loss.trained = None if index is None else (index, target)
        return args, kwargs

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if not with_labels:
            return logits_of(hidden)
        loss.hidden = hidden
        return hidden[..., :1].detach()  # for the model to scale or cap

    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(look, with_kwargs=True).remove)
        undo.callback(setattr, model, "loss_function", before)
        replace_forward(head, forward, undo)
        model.loss_function = loss
        yield loss


@torch.no_grad()
def logit_change(model: torch.nn.Module) -> LogitChange | None:
    """Returns what a model does with its logits after the output layer, or None where it is neither a factor nor a soft-cap.

    The output layer is made to return known numbers, small and large, that every data type holds exactly, and the model's logits
    are compared with them. No name in the config is relied on, since they differ by family; a number that was measured is replaced
    by the one in the config that it is a rounding of.

    Args:
        model: a transformers model, without peft's wrapper around it.
    """
    head = model.get_output_embeddings()
    given: list[torch.Tensor] = []

    def numbers(hidden: torch.Tensor) -> torch.Tensor:
        place = torch.arange(hidden.shape[:-1].numel() * head.out_features, device=hidden.device)
        values = ((place * 37 % 257) - 128) * torch.where(place % 2 == 0, 1, 64)
        given.append(values.reshape(*hidden.shape[:-1], head.out_features).to(hidden.dtype))
        return given[-1].clone()

    with in_eval_mode(model), ExitStack() as undo:
        replace_forward(head, numbers, undo)
        ids = torch.tensor(random_rows(model, 4), device=model.get_input_embeddings().weight.device)
        logits = model(input_ids=ids).logits
    if len(given) != 1 or logits.shape != given[0].shape:
        return None
    before, after = given[0].double(), logits.to(given[0].device).double()
    rounding = max(torch.finfo(each.dtype).eps for each in (logits, given[0]))
    written = [value for value in model.config.get_text_config().to_dict().values() if isinstance(value, int | float)]
    return _factor(before, after, rounding, written) or _soft_cap(before, after, rounding, written)


def _factor(before: torch.Tensor, after: torch.Tensor, rounding: float, written: list[float]) -> LogitChange | None:
    scale = float((before * after).sum() / before.square().sum())
    if scale <= 0 or not ((after - scale * before).abs() <= 2 * rounding * (scale * before).abs()).all():
        return None
    exact = [1.0, *(each for value in written if value for each in (float(value), 1 / value))]
    return LogitChange(scale=next((each for each in exact if abs(each / scale - 1) <= rounding), scale))


def _soft_cap(before: torch.Tensor, after: torch.Tensor, rounding: float, written: list[float]) -> LogitChange | None:
    """The cap is the number in the config that gives what was measured: logits needn't reach a wide one."""
    for cap in sorted({float(value) for value in written if 0 < value < float("inf")}):
        expected = cap * (before / cap).tanh()
        # A quotient, a tanh and a product are rounded, and what the first loses a steep tanh passes on.
        if ((after - expected).abs() <= 4 * rounding * expected.abs()).all():
            return LogitChange(cap=cap)
    return None


@torch.no_grad()
def chunked_loss_refusal(model: torch.nn.Module) -> str | None:
    """Says why a model needs its own loss, or None where it is proved on the model that the loss in chunks can take its place.

    Args:
        model: a transformers model, without peft's wrapper around it.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.weight.requires_grad:
        return "the output layer is trained or is not a linear layer: all of its logits are needed"
    return why_it_fails(lambda: _prove_loss(model), "the loss in chunks does not fit this model")


def _prove_loss(model: torch.nn.Module) -> None:
    """Compares the model's own loss with the one in chunks, on a few random tokens.

    Raises:
        NotProvedError: they differ, or would for other logits.
    """
    if logit_change(model) is None:
        raise NotProvedError("the model changes its logits after the output layer: its own loss is used")
    ids = torch.tensor(random_rows(model, 24), device=model.get_input_embeddings().weight.device)
    with in_eval_mode(model):
        own = model(input_ids=ids, labels=ids)
        with loss_in_chunks(model) as chunked:
            found = model(input_ids=ids, labels=ids).loss
    if chunked.per_token is None:
        raise NotProvedError("the model computes its loss in a way of its own, which is used")
    apart, largest = float((found - own.loss).abs()), float(own.logits.abs().max())
    rounding = max(torch.finfo(own.logits.dtype).eps, torch.finfo(torch.float32).eps)
    if not apart <= 4 * rounding * max(float(own.loss), largest):
        raise NotProvedError(f"the model's own loss differs from the loss in chunks by {apart:.2g}: its own is used")
