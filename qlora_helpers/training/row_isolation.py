"""Proves on the loaded model that the rows of a packed sequence don't attend to each other, or says why they do.

No list of families decides which models train on packed rows: short rows of random tokens go through the model in hand as the
trainer would send them. A sliding window is narrowed to a few tokens for the proof, so that short rows reach past it, after it was
made sure that the model's own values follow. How far values may lie apart is measured too (`proving`). Knows nothing of data,
settings or runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device

from qlora_helpers.base.errors import ModelError
from qlora_helpers.base.place import at
from qlora_helpers.data import batches
from qlora_helpers.data.batches import AllLogits, SequenceCollator
from qlora_helpers.data.labels import IGNORED
from qlora_helpers.model.shapes.families import ALIBI, is_recurrent, positions_refusal, uses_alibi
from qlora_helpers.model.wiring import base_model_of, in_eval_mode, windows_of
from qlora_helpers.training.proving import (
    ROUNDINGS,
    Choices,
    NotProvedError,
    random_rows,
    values_rounded_anew,
    why_it_fails,
)

LEAK = 1e-3  # largest change when the row before changes, as a share of the logits' spread
MOST_APART = 0.5  # share of a gradient that is called rounding, however much more rounding moves it
LONG_WINDOW = 512  # tokens; rows past a longer window that can't be narrowed would be dear
NARROWED = 5  # tokens that a window is narrowed to


def plain_attention(model: torch.nn.Module, longest: int) -> batches.Attention:
    """How the plain path keeps packed rows apart: by a mask of ours, or by positions alone where layers have masks of their own.

    Args:
        model: with or without adapters.
        longest: an upper bound on a row's tokens.
    """
    inner = base_model_of(model)
    eager = getattr(inner.config, "_attn_implementation", "sdpa") == "eager"
    dtype = inner.dtype if eager else None
    if has_state(inner):
        return batches.RestartedPositions(with_state=True)
    window = shortest_window(inner)
    if window >= longest:
        return batches.BlockDiagonalMask(dtype)
    kinds = set(getattr(inner.config.get_text_config(), "layer_types", None) or ())
    if kinds == {"full_attention", "sliding_attention"} and not _restart_isolates(model):
        return batches.LayerMasks(int(window), dtype)
    return batches.RestartedPositions()


@torch.no_grad()
def _restart_isolates(model: torch.nn.Module) -> bool:
    """Whether positions alone keep rows apart: not every model builds its masks from them."""
    first, other, second = random_rows(model, 23, 23, 17)
    with in_eval_mode(model):
        logits = [_packed_logits(model, batches.RestartedPositions(), before, second, 1) for before in (first, other)]
    return float((logits[0] - logits[1]).abs().max() / logits[0].std()) <= LEAK


def has_state(model: torch.nn.Module) -> bool:
    """Whether some of a model's layers carry a state from token to token."""
    return is_recurrent(model.config.get_text_config().to_dict())


def shortest_window(model: torch.nn.Module) -> float:
    """Tokens of the shortest sliding window or chunk that any layer attends to; infinite where there is none."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    if kinds and set(kinds) == {"full_attention"}:  # though the config may give a window
        return float("inf")
    windows = [value for _, _, value in _windows(model)]
    return min(windows, default=float("inf"))


@at("check before training")
@torch.no_grad()
def packing_refusal(model: torch.nn.Module, longest: int, sequences: int = 1) -> str | None:
    """Says in a sentence why a loaded model can't train on packed rows, or None where they are proved not to attend to each other.

    Args:
        model: with or without adapters.
        longest: an upper bound on a row's tokens.
        sequences: packed sequences in one forward pass; kernels of recurrent layers may take one alone.
    """
    inner = base_model_of(model)
    if uses_alibi(inner.config.get_text_config().to_dict()):
        return ALIBI

    def why(sequences: int) -> str | None:
        return why_it_fails(
            lambda: prove_isolation(inner, plain_attention(inner, longest), longest, sequences=sequences),
            "it can't take packed rows",
        )

    refusal = why(sequences)
    if refusal is not None and sequences > 1 and has_state(inner) and why(1) is None:
        return (
            f"{refusal}; one sequence a pass can be packed (train.micro_batch_size=1, with longer data.seq_len_tokens)"
        )
    return refusal


@at("check before training")
def check_isolation(model: torch.nn.Module, collator: SequenceCollator, *, longest: int) -> tuple[float, float]:
    """Does what `prove_isolation` does, for the batches that training will have.

    Raises:
        ModelError: the rows attend to each other.
    """
    try:
        return prove_isolation(model, collator.attention, longest)
    except NotProvedError as error:
        raise ModelError(
            "this model lets packed rows attend to each other",
            expected="a row's logits not to depend on the row before it",
            got=str(error),
            next_step="Set data.packing=false.",
        ) from error


@torch.no_grad()
def prove_isolation(
    model: torch.nn.Module, attention: batches.Attention, longest: int, *, sequences: int = 1
) -> tuple[float, float]:
    """Proves on the loaded model that a row in a packed sequence gets the logits that it gets alone.

    There are two probes. Other tokens in the row before must not change a row's logits; the same sums are computed either way, so
    this is exact even in bfloat16, unless a layer's kernels depend on all tokens (experts): then as exact as for unpacked rows.
    And the row alone must give the same logits up to rounding, through the same experts, with windows narrowed until the rows are
    longer, or where that changes nothing in a row that is longer than the window.

    Args:
        model: with or without adapters.
        attention: how rows are kept apart.
        longest: an upper bound on a row's tokens.
        sequences: packed sequences in one forward pass.

    Returns:
        The two differences found, as shares of the logits' spread.

    Raises:
        NotProvedError: the rows attend to each other, the windows can't be narrowed for the proof, or a row can be so long that
            it changes the positions of the rows beside it, which rows as short as the proof's don't show.
    """
    inner = base_model_of(model)
    if reason := positions_refusal(inner.config.get_text_config().to_dict(), longest):
        raise NotProvedError(reason)
    first, other, second = random_rows(model, 23, 23, 17)
    own_window = shortest_window(inner)
    with in_eval_mode(model), ExitStack() as narrowed:
        wide, own_attention = _logits(model, [second]), attention
        attention = _narrowed(inner, attention, longest, narrowed)
        alone = _logits(model, [second])
        if NARROWED < own_window < longest and torch.equal(wide, alone):  # kept in a buffer, or another name
            narrowed.close()
            if own_window > LONG_WINDOW:
                raise NotProvedError(
                    f"its window of {own_window:g} tokens is not where its config and layers say, and can't be proved"
                )
            attention, (second,) = own_attention, random_rows(model, int(own_window) + 17)
            alone = _logits(model, [second])
        spread = alone.std()
        packed = [_packed_logits(model, attention, before, second, sequences) for before in (first, other)]
        changed = float((packed[0] - packed[1]).abs().max() / spread)
        if not changed <= LEAK:
            unpacked = [_logits(model, [second[:17], before[:17]]) for before in (first, other)]
            own = float((unpacked[0] - unpacked[1]).abs().max() / spread)
            if not changed <= 4 * own:
                raise NotProvedError(f"its rows reach each other: {_why(inner, changed)}")
        choices = Choices(len(second))
        with choices.watched():
            alone = _logits(model, [second])
        with choices.watched():
            same = _packed_logits(model, attention, first, second, sequences)
        apart = float((same - alone).square().mean().sqrt() / spread)
        with values_rounded_anew(inner), choices.watched():
            rounded = float((_logits(model, [second]) - alone).square().mean().sqrt() / spread)
    if not apart <= ROUNDINGS * rounded:
        raise NotProvedError(
            f"a row's logits differ by {apart:.2%} of their spread between packed and alone, and rounding explains "
            f"{ROUNDINGS * rounded:.2%}"
        )
    return changed, apart


def prove_gradients(model: torch.nn.Module, attention: batches.Attention, longest: int) -> float:
    """Proves of a row's gradients in a packed sequence what `prove_isolation` proves of its logits, for kernels of our own.

    A random sum of the row's logits is differentiated by the embeddings. The row before must get no gradient, and the row itself
    the one that it gets alone, up to rounding.

    Args:
        model, attention, longest: as for `prove_isolation`, which comes first.

    Returns:
        The root mean square difference from the row alone, as a share of its gradient.

    Raises:
        NotProvedError: the gradients differ.
    """
    inner = base_model_of(model)
    first, _, second = random_rows(model, 23, 23, 17)
    with in_eval_mode(model), ExitStack() as narrowed:
        attention = _narrowed(inner, attention, longest, narrowed)
        choices = Choices(len(second))
        with choices.watched():
            alone = _slopes(model, lambda: _logits(model, [second]))
        with choices.watched():
            packed = _slopes(model, lambda: _packed_logits(model, attention, first, second, 1))
        with values_rounded_anew(inner), choices.watched():
            rounded = _slopes(model, lambda: _logits(model, [second])) - alone
    size = alone.square().mean().sqrt()
    leaked = float(packed[: len(first)].abs().max() / size)
    apart = float((packed[len(first) :] - alone).square().mean().sqrt() / size)
    allowed = min(MOST_APART, ROUNDINGS * float(rounded.square().mean().sqrt() / size))
    if not (leaked <= LEAK and apart <= allowed):
        raise NotProvedError(
            f"a row's gradients differ by {apart:.2%} between packed and alone, where rounding explains {allowed:.2%}, and reach "
            f"the row before it by {leaked:.2%}"
        )
    return apart


def _slopes(model: torch.nn.Module, logits_of: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The gradient of a random sum of logits by the embeddings of the first sequence, `(tokens, hidden)`."""
    embeddings: list[torch.Tensor] = []

    def watch(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    with torch.enable_grad(), ExitStack() as undo:
        undo.callback(model.get_input_embeddings().register_forward_hook(watch).remove)
        logits = logits_of()
        factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
        (slopes,) = torch.autograd.grad((logits * factors).sum(), embeddings[:1])
    return slopes[0].float()


def _narrowed(inner: torch.nn.Module, attention: batches.Attention, longest: int, undo: ExitStack) -> batches.Attention:
    """Narrows windows that are shorter than the longest row and longer than the probe's, and with them a mask of ours."""
    if NARROWED < shortest_window(inner) < longest:
        undo.enter_context(windows_narrowed(inner))
        if isinstance(attention, batches.LayerMasks):
            return replace(attention, window=min(attention.window, NARROWED))
    return attention


def _why(inner: torch.nn.Module, changed: float) -> str:
    change = f"a row's logits change by {changed:.2%} of their spread with the row before it"
    if has_state(inner):
        return f"{change}, since its recurrent layers carry their state over with the kernels in use here"
    return change


def _logits(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """The logits of the first of a few rows of one length, `(tokens, vocabulary)`, which are not packed."""
    device = model.get_input_embeddings().weight.device
    return model(input_ids=torch.tensor(rows, device=device)).logits[0].float()


def _packed_logits(
    model: torch.nn.Module, attention: batches.Attention, before: list[int], row: list[int], sequences: int
) -> torch.Tensor:
    """The logits of a row that comes last in a packed sequence, `(tokens, vocabulary)`; further sequences repeat the first."""
    ids, segments = before + row, [1] * len(before) + [2] * len(row)
    sequence = {"input_ids": ids, "labels": [IGNORED] * len(ids), "segment_ids": segments}
    batch = SequenceCollator(0, attention, AllLogits())([sequence] * min(sequences, 2))
    del batch["labels"]
    device = model.get_input_embeddings().weight.device
    logits = model(**send_to_device(batch, device)).logits
    return logits[-1, len(before) :].float()


def _windows(model: torch.nn.Module) -> list[tuple[Any, str, int]]:
    """Where a window of the text part is written down: owner, attribute and tokens, for configs and layers."""
    text = model.config.get_text_config()
    owners = {id(text): text}
    for module in model.modules():
        config = getattr(module, "config", text)  # a tower for pictures has windows too, in a config of its own
        if getattr(config, "model_type", None) == text.model_type:
            owners |= {id(config): config, id(module): module}
    return [(owner, *found) for owner in owners.values() for found in windows_of(owner)]


@contextmanager
def windows_narrowed(model: torch.nn.Module, tokens: int = NARROWED) -> Iterator[None]:
    """While open, a model's sliding windows and chunks are at most so many tokens; its config and its layers say so.

    Args:
        model: a transformers model, without peft's wrapper around it.
        tokens: of the narrowed windows.
    """
    found = _windows(model)
    for owner, name, value in found:
        setattr(owner, name, min(value, tokens))
    try:
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)
