"""Loads a run's model, adds adapters to it and prepares its data: what training, asking and evaluating begin with."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.text import Say
from qlora_helpers.data.prepare import content_marks
from qlora_helpers.data.run_data import run_data
from qlora_helpers.model.shapes.families import packing_refusal
from qlora_helpers.planning import out_of_memory, run_plan
from qlora_helpers.runs.folder import Run
from qlora_helpers.training.checkpoints import has_trained, refuse_other_than_trained_on
from qlora_helpers.training.in_processes import remark_on_loading
from qlora_helpers.training.processes import join, main_process_first

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.model.loading import LoadedModel


log = logging.getLogger(__name__)


@out_of_memory.rescued
def load(run: Run, *, say: Say = print) -> LoadedModel:
    """Loads the run's base model and tokenizer and audits them.

    The plan distributes the layers over several GPUs of one process; several processes share them as `train.share` says.
    """
    from qlora_helpers.model.loading import load_model
    from qlora_helpers.model.placement import on_a_gpu
    from qlora_helpers.model.shares import sharing

    config = run.config()
    shared = sharing(config.train.share)
    if shared.processes > 1:
        join(on_cpu=not on_a_gpu(config.model))
    elif remark := remark_on_loading(run):
        say(remark)
    return load_model(config.model, spread=lambda gpus: run_plan.layers_per_gpu(config, gpus), sharing=shared, say=say)


def add_adapters(run: Run, loaded: LoadedModel) -> PeftModel:
    """Adds new adapters to a loaded model, as the run's settings say."""
    from qlora_helpers.model import lora

    config = run.config()
    return lora.add_adapters(loaded.model, config.adapter, seed=config.train.seed)


def prepare_data(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shape: dict[str, Any],
    model: torch.nn.Module | None = None,
    say: Say = print,
) -> PreparedData:
    """Returns the run's labelled and packed data: what is saved if it still fits the settings, else prepares and saves it.

    Rows are packed where the model keeps them from attending to each other. A proof on the loaded model decides that; before there
    is one, its `config.json` does, and once the run has trained, the data that it trained on.

    Args:
        run: the run.
        tokenizer: the model's.
        shape: the model's `config.json`.
        model: the loaded model that is about to train, with or without adapters.
        say: called with a line on what takes long.

    Raises:
        UserError: the data can't be used, its label report failed, or the run has trained on other data.
    """
    refuse_other_than_trained_on(run, content_marks(run.config().data, tokenizer))
    config = run.config()
    forecast = packing_refusal(shape, config.data.seq_len_tokens)
    if model is None or not config.data.packing or has_trained(run):
        with _first_prepares(run):
            return run_data(run, tokenizer, no_packing=forecast, settled=True)
    from qlora_helpers.training import row_isolation

    longest, sequences = config.data.seq_len_tokens, config.train.micro_batch_size
    no_packing = row_isolation.packing_refusal(model, longest, sequences)
    if (no_packing is None) != (forecast is None):
        why = "its rows are proved not to attend to each other" if no_packing is None else no_packing
        log.info("rows are %s after all: %s", "packed" if no_packing is None else "padded", why)
    with _first_prepares(run):  # after the proof, in which all take part where layers are shared out
        return run_data(run, tokenizer, no_packing=no_packing)


def _first_prepares(run: Run) -> contextlib.AbstractContextManager[None]:
    """Of several processes, lets the first prepare the data, and the others read what it wrote."""
    from qlora_helpers.model.placement import on_a_gpu

    return main_process_first(on_cpu=not on_a_gpu(run.config().model))
