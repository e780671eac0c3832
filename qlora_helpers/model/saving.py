"""Writes a model into a cache, whichever of several processes makes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_here(model: PreTrainedModel, folder: Path) -> None:
    """Saves a model that this process alone has made.

    Once several processes have joined, transformers 5.23 takes `save_pretrained` for a joint action and writes in the first of them
    alone (`should_save_on_this_rank`); each machine's cache is its own, though, and any process may be the first to fill it.

    Args:
        model: the whole model.
        folder: where its files go.
    """
    model.should_save_on_this_rank = lambda *_: True
    try:
        model.save_pretrained(folder)
    finally:
        del model.should_save_on_this_rank
