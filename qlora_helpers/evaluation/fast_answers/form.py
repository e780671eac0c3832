"""The form in which a model answers fastest, as far as memory allows, and a record of what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import torch

from qlora_helpers.base.units import gib
from qlora_helpers.evaluation.fast_answers import memory
from qlora_helpers.evaluation.fast_answers.attention import keys_shared
from qlora_helpers.evaluation.fast_answers.decoder import NotFast
from qlora_helpers.evaluation.fast_answers.weights import adapters_in_model_type, dense_bytes, dense_weights
from qlora_helpers.model.host_embedding import restore_embedding


@dataclass
class AnswerForm:
    """The form in which a model answered.

    Attributes:
        dense: whether 4-bit layers multiply by unpacked copies of their weights.
        dense_gib: memory that the copies take.
        dtype: of the copies and the cache.
        slots: answers that grow at once; None before the first was given.
        graphs: CUDA graphs captured.
        steps: steps taken; each adds a token to every slot.
        reasons: why a part is off.
    """

    dense: bool = False
    dense_gib: float = 0.0
    dtype: str = ""
    slots: int | None = None
    graphs: int = 0
    steps: int = 0
    reasons: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        weights = (
            f"{self.dtype} copies of the 4-bit weights ({self.dense_gib:.2f} GiB)"
            if self.dense
            else "weights as loaded"
        )
        graphs = f", {self.graphs} CUDA graphs" if self.graphs else ""
        slots = "" if self.slots is None else f"{self.slots} answers at once, "
        return "\n".join([f"{slots}{weights}, adapters apart{graphs}", *(f"({reason})" for reason in self.reasons)])

    def note(self, reason: str) -> None:
        """Adds a reason, unless it is there already."""
        if reason not in self.reasons:
            self.reasons.append(reason)


@contextmanager
def answering_form(
    model: torch.nn.Module, *, rows: int, tokens: int, dense: bool | None = None
) -> Iterator[AnswerForm]:
    """Puts the model into the fastest form that fits while it answers, and leaves it as it was.

    Args:
        model: with or without adapters; nothing is trained while this is open.
        rows: answers at once.
        tokens: of the longest prompt with its answer.
        dense: whether to unpack 4-bit layers; None where memory allows.
    """
    with suppress(torch.OutOfMemoryError):  # an embedding that a failed training left on the host
        restore_embedding(model.get_input_embeddings())
    form = AnswerForm(dtype=str(model.dtype).removeprefix("torch."))
    needed = dense_bytes(model)
    if needed and dense is None:
        dense = _copies_fit(model, form, needed, rows, tokens)
    with ExitStack() as opened:
        if needed and dense:
            _open_dense_weights(model, form, needed, opened)
        for part in (adapters_in_model_type, keys_shared):
            opened.enter_context(part(model))
        yield form


def _copies_fit(model: torch.nn.Module, form: AnswerForm, needed: int, rows: int, tokens: int) -> bool:
    try:
        cache = memory.cache_bytes(model, rows, tokens)
    except NotFast:  # and so answers come from `model.generate`, whose cache nobody has counted
        form.note("weights are not unpacked, since the cache beside them has an unknown size")
        return False
    free = memory.free_bytes(model)
    fit = needed + cache <= (1 - memory.SPARE_SHARE) * free
    if not fit:
        form.note(f"unpacked weights take {gib(needed):.1f} GiB beside the cache, and {gib(free):.1f} GiB are free")
    return fit


def _open_dense_weights(model: torch.nn.Module, form: AnswerForm, needed: int, opened: ExitStack) -> None:
    try:
        opened.enter_context(dense_weights(model))
        form.dense, form.dense_gib = True, gib(needed)
        return
    except torch.OutOfMemoryError:  # free memory in pieces that are too small, or taken by another process meanwhile
        form.note(f"unpacked weights of {gib(needed):.1f} GiB did not fit after all")
    memory.empty_cache()  # after the error, whose traceback holds the copies that were made
