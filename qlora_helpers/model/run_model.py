"""A run's model in memory: the run, its base model and the adapters on it, which most steps after training need together."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_helpers.runs.folder import Run

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.model.loading import LoadedModel


@dataclass(frozen=True)
class RunModel:
    """A run's model in memory.

    Attributes:
        run: the run; its settings say how the model was trained and how it is asked.
        model: the model that answers, with the run's adapters; or a merged model, which has none.
        loaded: the base model under `model`.
    """

    run: Run
    model: PeftModel
    loaded: LoadedModel

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self.loaded.tokenizer

    def with_adapters(self, on: bool) -> contextlib.AbstractContextManager[None]:
        """While open, the tuned model answers, or with `on` False the base model."""
        return contextlib.nullcontext() if on else self.model.disable_adapter()
