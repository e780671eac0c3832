"""Writes a run's `adapter/`, loads it onto a base model, and certifies that it is the adapter that was trained."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from qlora_helpers.base.files import read_json, replaced_folder, write_json
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.evaluation.comparison import answered, compared
from qlora_helpers.export.card import adapter_card
from qlora_helpers.export.certificate import SETTINGS, WEIGHTS
from qlora_helpers.machine.environment import versions
from qlora_helpers.model.checkpoints import base_fingerprint
from qlora_helpers.model.run_model import RunModel
from qlora_helpers.runs.folder import Run
from qlora_helpers.runs.locks import MODEL_IN_USE
from qlora_helpers.training.rank_failures import is_of_exchange

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_helpers.data.packing import PreparedData
    from qlora_helpers.export.certificate import Certificate
    from qlora_helpers.model.loading import LoadedModel

log = logging.getLogger(__name__)


def save_adapter(trained: RunModel) -> None:
    """Writes the adapter, the tokenizer and the run's settings into the run's `adapter/`, whole or not at all."""
    run, checkpoint = trained.run, trained.loaded.checkpoint
    config = run.config()
    with replaced_folder(run.adapter_dir) as folder:
        # 'auto' would ask the hub whether the embedding was resized; it never is here.
        trained.model.save_pretrained(folder, save_embedding_layers=False)
        trained.tokenizer.save_pretrained(folder)
        settings = read_json(folder / SETTINGS)
        settings["base_model_name_or_path"] = checkpoint.name
        settings["revision"] = checkpoint.revision
        write_json(folder / SETTINGS, settings)
        write_json(folder / "config.json", config.to_dict())
        (folder / "README.md").write_text(adapter_card(run, config, trained.loaded), encoding="utf-8")


def need_adapter(run: Run) -> None:
    """Refuses a run without a saved adapter; this needs no model, so it comes before one is loaded.

    Raises:
        RunError: the run has no adapter yet.
    """
    run.need(run.adapter_dir / WEIGHTS, "Notebook 04_train (or `python -m qlora_helpers train`)")


def load_adapter(run: Run, loaded: LoadedModel) -> PeftModel:
    """Adds the run's saved adapter to a freshly loaded base model.

    Raises:
        RunError: the run has no adapter yet.
    """
    from qlora_helpers.model import adapter_loading

    need_adapter(run)
    return adapter_loading.load_adapter(loaded.model, run.adapter_dir)


def certify(trained: RunModel, data: PreparedData, *, prompts: int = 3) -> Certificate:
    """Compares the saved adapter with the live one and writes `adapter/certificate.json`, whatever it finds.

    Args:
        trained: the model in memory whose adapter was just saved.
        data: provides the held-out rows that are asked.
        prompts: how many rows are asked.
    """
    from qlora_helpers.export import certify as certifying

    run, model = trained.run, trained.model
    expected = certifying.expected_tensors(model)
    asked = ask_saved(trained, data, prompts=prompts)
    prepared = read_prepared_file(run.data_dir)
    checkpoint = trained.loaded.checkpoint
    return certifying.certify(
        run.adapter_dir,
        expected,
        settings=certifying.expected_settings(model),
        asked=asked,
        versions=versions(),
        base={"name": checkpoint.name, "revision": checkpoint.revision, "sha256": base_fingerprint(checkpoint.folder)},
        data_fingerprint=prepared.fingerprint if prepared else None,
    )


def ask_saved(trained: RunModel, data: PreparedData, *, prompts: int = 3) -> dict[str, Any]:
    """Asks the live adapter and the saved one, and compares them; where layers are shared out, all processes do so together.

    Args:
        trained, data, prompts: as for `certify`.

    Returns:
        `prompts`, `largest_difference` and `same_answers`; no prompts where the saved adapter could not be asked.
    """
    from qlora_helpers.export import certify as certifying

    try:
        with MODEL_IN_USE:
            live = answered(trained, data, prompts)
            with certifying.saved_weights_in_place(trained.model, trained.run.adapter_dir):
                saved = answered(trained, data, prompts)
            return compared(live, saved)
    except (RuntimeError, OSError, ValueError, KeyError) as error:  # a damaged file; the certificate names its tensors
        if is_of_exchange(error):  # another process has ended, which says nothing of the file
            raise
        log.warning("the saved adapter was not asked: %s: %s", type(error).__name__, error)
        return {"prompts": 0, "largest_difference": None, "same_answers": 0}
