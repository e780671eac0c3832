"""The model cards of a run's adapter and of an exported run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_helpers.base.config import RunConfig
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.evaluation.evaluation_file import read_evaluation
from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.result import score_cells, scoring_from_dict
from qlora_helpers.evaluation.worth import model_name
from qlora_helpers.export.certificate import FILE, Certificate
from qlora_helpers.runs.folder import Run

if TYPE_CHECKING:
    from qlora_helpers.model.loading import LoadedModel


_CARD_NOTE = "Answers need the prompt that was trained; see `qlora_helpers`, template `{template}`."


def export_card(run: Run, certificate: Certificate, *, merged: bool) -> str:
    """Writes the card of an export: what it is, its base model and data, its scores, and its limits."""
    config, adapter = run.config(), run.config().adapter
    prepared = read_prepared_file(run.data_dir)
    source = prepared.source if prepared else "dialogues"  # a name and licence, never a path
    head = ["---", f"base_model: {certificate.base_model}"]
    head += [] if merged else ["library_name: peft"]
    head += ["pipeline_tag: text-generation", f"base_model_relation: {'merge' if merged else 'adapter'}", "---"]
    what = "The base model with its adapter merged in, bfloat16" if merged else "A LoRA adapter"
    lines = [
        *head,
        "",
        f"# {run.name}",
        "",
        f"{what} (r={adapter.r}, alpha={adapter.lora_alpha}) for {certificate.base_model} at revision "
        f"{certificate.base_revision or 'unknown'}, trained on {source} to summarise dialogues.",
        "",
        _CARD_NOTE.format(template=(prepared and prepared.template) or config.data.template),
        "",
    ]
    if values := read_evaluation(run):
        scoring = scoring_from_dict(values.get("scoring", {}))
        header = ["model", *(measure_of(key).label for key in scoring.measures), "answers that end"]
        lines += [
            f"On {len(values['rows'])} held-out rows:",
            "",
            "| " + " | ".join(header) + " |",
            "|---" * len(header) + "|",
        ]
        lines += [
            "| " + " | ".join([model_name(name), *score_cells(score, scoring), f"{score['stop_rate']:.0%}"]) + " |"
            for name, score in values["scores"].items()
        ]
        verdict = values.get("comparisons", {}).get("base", {}).get("verdict")
        said = [f"Tuned against untuned: {verdict}"] if verdict else []
        said += [values["worth"]] if values.get("worth") and not values.get("random_weights") else []
        lines += ["", *(line for sentence in said for line in (sentence, ""))]
    lines += [
        f"Certificate: `{FILE}` (adapter sha256 `{certificate.weights_sha256[:16]}`). Like any such model it makes things up.",
        "",
    ]
    return "\n".join(lines)


def adapter_card(run: Run, config: RunConfig, loaded: LoadedModel) -> str:
    """Writes the card of an adapter that was just trained: base model, adapter, data and prompt."""
    prepared = read_prepared_file(run.data_dir)
    source = prepared.source if prepared else "dialogues"  # a name and licence, never a path
    template = (prepared and prepared.template) or config.data.template
    storage = "in 4-bit NF4 (QLoRA) " if config.model.quantization == "nf4" else ""
    return (
        f"---\nbase_model: {loaded.checkpoint.name}\nlibrary_name: peft\npipeline_tag: text-generation\n---\n\n"
        f"# {run.name}\n\nA LoRA adapter (r={config.adapter.r}, alpha={config.adapter.lora_alpha}) for "
        f"{loaded.checkpoint.name}, trained {storage}on {source} to summarise dialogues.\n\n"
        f"Prompt: the `{template}` template of qlora_helpers. Settings: `config.json` beside this file.\n"
    )
