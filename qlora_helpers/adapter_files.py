"""A run's `adapter/`: written whole, put back on a base model, and certified to be the adapter that was trained."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qlora_helpers.checkpoints import base_fingerprint
from qlora_helpers.comparison import answered, compared
from qlora_helpers.config import RunConfig
from qlora_helpers.locks import MODEL_IN_USE
from qlora_helpers.measured import versions
from qlora_helpers.run import Run
from qlora_helpers.whole_files import read_json, replaced_folder, write_json

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_helpers.blocks import PreparedData
    from qlora_helpers.certificate import Certificate
    from qlora_helpers.models import LoadedModel

log = logging.getLogger(__name__)


def save_adapter(run: Run, model: PeftModel, loaded: LoadedModel) -> None:
    """Writes the adapter, the tokenizer and the run's settings into `adapter/`, whole or not at all."""
    config = run.config()
    with replaced_folder(run.adapter_dir) as folder:
        # 'auto' would ask the hub whether the embedding was resized; it never is here.
        model.save_pretrained(folder, save_embedding_layers=False)
        loaded.tokenizer.save_pretrained(folder)
        settings = read_json(folder / "adapter_config.json")
        settings["base_model_name_or_path"] = loaded.checkpoint.name
        settings["revision"] = loaded.checkpoint.revision
        write_json(folder / "adapter_config.json", settings)
        write_json(folder / "config.json", config.to_dict())
        (folder / "README.md").write_text(_model_card(run, config, loaded), encoding="utf-8")


def _model_card(run: Run, config: RunConfig, loaded: LoadedModel) -> str:
    prepared = run.data_dir / "prepared.json"
    source = read_json(prepared)["source"] if prepared.exists() else "dialogues"  # a name and licence, never a path
    storage = "in 4-bit NF4 (QLoRA) " if config.model.quantization == "nf4" else ""
    return (
        f"---\nbase_model: {loaded.checkpoint.name}\nlibrary_name: peft\npipeline_tag: text-generation\n---\n\n"
        f"# {run.name}\n\nA LoRA adapter (r={config.adapter.r}, alpha={config.adapter.lora_alpha}) for "
        f"{loaded.checkpoint.name}, trained {storage}on {source} to summarise dialogues.\n\n"
        f"Prompt: the `{config.data.template}` template of qlora_helpers. Settings: `config.json` beside this file.\n"
    )


def load_adapter(run: Run, loaded: LoadedModel) -> PeftModel:
    """Puts the run's saved adapter on a freshly loaded base model.

    Raises:
        RunError: the run has no adapter yet.
    """
    from qlora_helpers import lora

    run.need(run.adapter_dir / "adapter_model.safetensors", "Notebook 04_train (or `python -m qlora_helpers train`)")
    return lora.load_adapter(loaded.model, run.adapter_dir)


def certify(run: Run, model: PeftModel, loaded: LoadedModel, data: PreparedData, *, prompts: int = 3) -> Certificate:
    """Compares the saved adapter with the live one and writes `adapter/certificate.json`, whatever was found.

    Args:
        run: a run whose adapter was just saved.
        model: the model in memory that it was saved from.
        loaded: the base model that `model` stands on.
        data: its held-out rows are asked.
        prompts: how many.
    """
    from qlora_helpers import certificate

    asked = {"prompts": 0, "largest_difference": None, "same_answers": 0}
    expected = certificate.expected_tensors(model)
    try:
        with MODEL_IN_USE:
            live = answered(run, model, loaded, data, prompts)
            with certificate.saved_weights_in_place(model, run.adapter_dir):
                saved = answered(run, model, loaded, data, prompts)
            asked = compared(live, saved)
    except (RuntimeError, OSError, ValueError, KeyError) as error:  # a damaged file: the certificate names its tensors
        log.warning("the saved adapter was not asked: %s: %s", type(error).__name__, error)
    prepared = run.data_dir / "prepared.json"
    checkpoint = loaded.checkpoint
    return certificate.certify(
        run.adapter_dir, expected, settings=certificate.expected_settings(model), asked=asked, versions=versions(),
        base={"name": checkpoint.name, "revision": checkpoint.revision, "sha256": base_fingerprint(checkpoint.folder)},
        data_fingerprint=read_json(prepared)["fingerprint"] if prepared.exists() else None,
    )  # fmt: skip
